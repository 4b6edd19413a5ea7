"""Compute precision, fused operations and activation memory of a training step.

A PEFT model computes the same with `Compute` as without, up to rounding, in less time and memory:

- attention over short sequences saves no scores (`edge_ft.models.short_attention`);
- the frozen and the low-rank product of an adapted layer are one operation, RMSNorm and a gated unit save only their
  inputs, and their outputs are recomputed where an adapted layer's backward pass needs them
  (`edge_ft.models.fused_ops`);
- in bfloat16 everything between the embedding and the head is stored and multiplied in it, while normalisation and
  loss are computed in float32 and the trained parameters stay float32;
- with memory `high` dequantized weights are cached;
- with memory `low` only the inputs of the transformer layers are saved (Chen et al., arXiv:1604.06174).
"""

import ctypes
import platform
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edge_ft.config import Memory
from edge_ft.families import Family
from edge_ft.models.fused_ops import (
    Recomputable,
    gated_lora_matmul,
    lora_matmul,
    rms_norm,
    rms_norm_parameters,
    swiglu,
)
from edge_ft.models.lora import layer_stacks
from edge_ft.models.scorer import task_model_of
from edge_ft.models.short_attention import use_short_attention
from edge_ft.quant.layers import FrozenLinear

__all__ = ["Compute", "set_malloc_thresholds"]


class Compute:
    """A context in which a PEFT model computes in `dtype`, fused, and recomputes its layers with memory `low`."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype, memory: Memory) -> None:
        """Wrap the layers of `model`, with or without PEFT, in place.

        Outside of the context they compute the same as before, and after `release` they are as before.
        """
        self.dtype = dtype
        self.active = False
        self._last_norm: tuple[Tensor, Recomputable] | None = None
        """Output of the last norm, and what it can be recomputed from."""
        self._recomputed: tuple[Tensor, Tensor, Tensor] | None = None
        """Input, weight and output of the norm that was recomputed last: several layers read it."""
        self._frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)] if memory == "high" else []
        self.cache_weights(dtype)
        set_malloc_thresholds(memory == "low")
        task_model = task_model_of(model)
        self._wrapping = ExitStack()
        """Removes what is wrapped around the layers."""
        self._wrapping.callback(task_model.set_attn_implementation, task_model.config._attn_implementation)
        use_short_attention(task_model)
        for name in layer_stacks(task_model, family):
            layers = task_model.get_submodule(name)
            for layer in layers:
                self._wrapping.callback(layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True).remove)
                if memory == "low":
                    self._replace_forward(layer, partial(self._checkpoint, layer.forward))
            self._wrapping.callback(layers[-1].register_forward_hook(self._leave_layers).remove)
            for module in layers.modules():
                self._wrap(module)

    def __enter__(self) -> None:
        self.active = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active, self._last_norm, self._recomputed = False, None, None

    def cache_weights(self, dtype: torch.dtype | None) -> None:
        """With memory `high`: cache the frozen weights in this dtype from now on, and drop others; None: cache none."""
        for layer in self._frozen:
            layer.cached_dtype, layer.cached = dtype, {}

    def stop_caching(self) -> None:
        """Cache no weights from now on, as with memory `normal`."""
        self.cache_weights(None)
        self._frozen = []

    def release(self) -> None:
        """Leave the layers as they were, for good: a trace sees what is wrapped around them."""
        self.stop_caching()
        self._wrapping.close()

    def dequantize(self) -> None:
        """With memory `high`: dequantize each frozen weight once; without, both passes of a step do that."""
        for layer in self._frozen:
            layer.dequantize(self.dtype)

    def _wrap(self, module: Any) -> None:
        """Replace the forward function of a module by one that computes as this context says."""
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            self._fuse_norm(module)
        elif type(module) is nn.LayerNorm:
            self._widen_norm(module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            self._fuse_gate(module)
        elif hasattr(module, "lora_A") and isinstance(module.base_layer, nn.Linear):
            self._fuse_lora(module)
        elif type(module) is nn.Linear:
            self._cast_weights(module)

    def _while_active(self, module: Any, forward: Callable[..., Any]) -> None:
        """Replace the forward function of a module by `forward` while inside the context."""
        plain = module.forward
        self._replace_forward(module, lambda *xs, **keywords: (forward if self.active else plain)(*xs, **keywords))

    def _replace_forward(self, module: Any, forward: Callable[..., Any]) -> None:
        """Give a module a forward function of its own until `release`."""
        if own := vars(module).get("forward"):
            self._wrapping.callback(setattr, module, "forward", own)
        else:
            self._wrapping.callback(delattr, module, "forward")
        module.forward = forward

    def _enter_layer(self, _: nn.Module, arguments: Any, keywords: Any) -> Any:
        return (_cast(arguments, self.dtype), _cast(keywords, self.dtype)) if self.active else None

    def _leave_layers(self, _: nn.Module, __: Any, output: Any) -> Any:
        return _cast(output, torch.float32) if self.active else None

    def _checkpoint(self, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if not (self.active and torch.is_grad_enabled()):
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    def _fuse_norm(self, norm: Any) -> None:
        """Fuse a frozen norm if it is the standard one: some families multiply elsewhere."""
        found = rms_norm_parameters(norm)
        if found is None or norm.weight.requires_grad:
            return
        weight, eps = found

        def forward(x: Tensor) -> Tensor:
            y = rms_norm(x, weight, eps)
            if x.dim() == 3:  # not of a head's queries and keys (Qwen 3), which come in between
                self._last_norm = y, (x, recompute)
            return y

        def recompute(x: Tensor) -> Tensor:
            last = self._recomputed
            if last is None or last[0].data_ptr() != x.data_ptr() or last[1] is not weight:
                self._recomputed = last = x, weight, rms_norm(x, weight, eps)
            return last[2]

        self._while_active(norm, forward)

    def _widen_norm(self, norm: Any) -> None:
        """Compute in float32 whatever the input is: on a GPU a norm does not mix dtypes."""
        plain = norm.forward
        self._while_active(norm, lambda x: plain(x.float()).to(x.dtype))

    def _fuse_gate(self, mlp: Any) -> None:
        """Fuse a gated unit if its activation is SiLU."""
        probe = torch.linspace(-3, 2, 7)
        if not torch.allclose(mlp.act_fn(probe), nn.functional.silu(probe)):
            return

        def forward(x: Tensor) -> Tensor:
            gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
            adapter = self._adapter(down)
            if adapter is None:
                return down(swiglu(gate, up))
            return gated_lora_matmul(gate, up, *adapter, down.base_layer)

        self._while_active(mlp, forward)

    def _fuse_lora(self, layer: Any) -> None:
        plain = layer.forward

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            adapter = self._adapter(layer)
            if adapter is None:
                return plain(x, *arguments, **keywords)
            recomputable = self._last_norm[1] if self._last_norm is not None and self._last_norm[0] is x else None
            return lora_matmul(x, *adapter, layer.base_layer, recomputable)

        self._replace_forward(layer, forward)

    def _adapter(self, layer: Any) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and scaling of a layer, if they are all that it adds to its frozen product now."""
        if not (self.active and hasattr(layer, "lora_A") and isinstance(layer.base_layer, nn.Linear)):
            return None
        name = layer.active_adapters[0]
        dropout = layer.training and getattr(layer.lora_dropout[name], "p", 0)
        up = layer.lora_B[name]
        if layer.disable_adapters or layer.merged or layer.lora_variant or dropout or up.bias is not None:
            return None
        return layer.lora_A[name].weight, up.weight, layer.scaling[name]

    def _cast_weights(self, layer: Any) -> None:
        """Let a float layer compute in its input's dtype; PEFT's LoRA layers wrap such layers too."""

        def forward(x: Tensor) -> Tensor:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return nn.functional.linear(x, layer.weight.to(x.dtype), bias)

        self._while_active(layer, forward)


def set_malloc_thresholds(low_memory: bool) -> None:
    """Set from which size glibc maps blocks, so that they return to the system when they are freed (mallopt(3)).

    Args:
        low_memory: Map blocks from 1 MiB. At 4 x 256 tokens that takes a third off the peak, since freed blocks of
            other sizes are not reused, and costs half as much time again: the pages of every block are new. Otherwise
            the thresholds are those that glibc's own adaptation reaches.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 2**20 if low_memory else 2**25)
    libc.mallopt(trim_threshold, 2**21 if low_memory else 2**26)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with every float tensor in it in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return {key: _cast(item, dtype) for key, item in value.items()} if type(value) is dict else value
