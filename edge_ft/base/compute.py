"""How a training step is computed: its numbers, what is fused into one operation, and what is kept of it.

A PEFT model with `Compute` gives the same as without, up to rounding, for less time and memory:

- attention over short sequences keeps no scores (`edge_ft.base.attention`);
- frozen and low-rank product of an adapted layer are one operation, which keeps its input alone;
- RMSNorm keeps its input and one number a row, a gated unit its two inputs, instead of every intermediate;
- in bfloat16 all that lies between the embedding and the head is held and multiplied in it, while
  normalisation and loss are computed in float32 and the trained parameters stay float32;
- with `recompute` only the inputs of the transformer layers are kept (Chen et al., arXiv:1604.06174).
"""

import ctypes
import platform
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edge_ft.base.attention import use_short_attention
from edge_ft.base.linear import stack_names, transposed_weight
from edge_ft.base.norm import plain_rms_norm
from edge_ft.families import Family

__all__ = ["Compute", "give_freed_memory_back", "has_bf16"]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; without it, it is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Compute:
    """Inside, `model` computes in `dtype`, fused, and recomputes its layers if told so."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype, recompute: bool) -> None:
        self.dtype = dtype
        self.active = False
        give_freed_memory_back(recompute)
        task_model = model.get_base_model()
        stacks = [task_model.get_submodule(stack) for stack in stack_names(task_model, family)]
        use_short_attention(task_model)
        for layers in stacks:
            for layer in layers:
                layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True)
                if recompute:
                    layer.forward = partial(self._recompute, layer.forward)
            layers[-1].register_forward_hook(self._leave_layers)
        for module in (module for layers in stacks for module in layers.modules()):
            if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
                self._fuse_norm(module)
            elif type(module) is nn.LayerNorm:
                self._widen_norm(module)
            elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
                self._fuse_gate(module)
            elif hasattr(module, "lora_A") and isinstance(module.base_layer, nn.Linear):
                self._fuse_lora(module)
            elif type(module) is nn.Linear:
                self._narrow(module)

    def __enter__(self) -> None:
        self.active = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active = False

    def _enter_layer(self, _: nn.Module, arguments: Any, keywords: Any) -> Any:
        return (_cast(arguments, self.dtype), _cast(keywords, self.dtype)) if self.active else None

    def _leave_layers(self, _: nn.Module, __: Any, output: Any) -> Any:
        return _cast(output, torch.float32) if self.active else None

    def _recompute(self, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if not (self.active and torch.is_grad_enabled()):
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    def _fuse_norm(self, norm: Any) -> None:
        """Where it is the plain norm: some families multiply elsewhere."""
        plain, found = norm.forward, plain_rms_norm(norm)
        if found is None or norm.weight.requires_grad:
            return
        weight, eps = found
        norm.forward = lambda x: _RMSNorm.apply(x, weight, eps) if self.active else plain(x)

    def _widen_norm(self, norm: Any) -> None:
        """In float32, whatever comes in: on a CPU that is how it mixes dtypes, on a GPU it would refuse to."""
        plain = norm.forward

        def forward(x: Tensor) -> Tensor:
            if not self.active or x.dtype == torch.float32:
                return plain(x)
            return plain(x.float()).to(x.dtype)

        norm.forward = forward

    def _fuse_gate(self, mlp: Any) -> None:
        """Where it is SiLU's."""
        plain, probe = mlp.forward, torch.linspace(-3, 2, 7)
        if not torch.allclose(mlp.act_fn(probe), nn.functional.silu(probe)):
            return

        def forward(x: Tensor) -> Tensor:
            if not self.active:
                return plain(x)
            y: Tensor = mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))
            return y

        mlp.forward = forward

    def _fuse_lora(self, layer: Any) -> None:
        plain = layer.forward

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            name = layer.active_adapters[0]
            fused = (
                self.active
                and not (layer.disable_adapters or layer.merged or layer.lora_variant)
                and not (layer.training and getattr(layer.lora_dropout[name], "p", 0))
            )
            if not fused:
                return plain(x, *arguments, **keywords)
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            y: Tensor = _LoraMatMul.apply(x, a, b, layer.base_layer, layer.scaling[name])
            return y

        layer.forward = forward

    def _narrow(self, layer: Any) -> None:
        """A float layer computes in its input's dtype; inside LoRA's it is the one that is wrapped."""
        plain = layer.forward

        def forward(x: Tensor) -> Tensor:
            if not self.active:
                return plain(x)
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return nn.functional.linear(x, layer.weight.to(x.dtype), bias)

        layer.forward = forward


def give_freed_memory_back(at_once: bool) -> None:
    """Let glibc map large blocks, so that they return to the system when they are freed (mallopt(3)).

    Otherwise its thresholds are those that it comes to by itself.
    At 4 x 256 tokens that takes a third off the peak, since freed blocks of other sizes are not reused, and costs
    half as much time again: the pages of every block are new.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 2**20 if at_once else 2**25)
    libc.mallopt(trim_threshold, 2**21 if at_once else 2**26)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every float tensor in it in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return {key: _cast(item, dtype) for key, item in value.items()} if type(value) is dict else value


class _RMSNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + eps) over the last dimension (arXiv:1910.07467), in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        wide = grad.float() * weight
        wide -= normed.mul_((wide * normed).mean(-1, keepdim=True))
        return wide.mul_(scale).to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up (Shazeer, arXiv:2002.05202), keeping the two alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _LoraMatMul(torch.autograd.Function):
    """x Wᵀ + bias + scaling · x Aᵀ Bᵀ over a frozen layer, as one operation that keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: nn.Linear, scaling: float) -> Tensor:
        rows = x.flatten(0, -2)
        a, b = a.to(x.dtype), b.to(x.dtype)
        weight = transposed_weight(layer, x.dtype)
        y = rows @ weight if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), rows, weight)
        down = rows @ a.T  # [rows, rank]
        y.addmm_(down, b.T, alpha=scaling)
        ctx.save_for_backward(rows, down, a, b)
        ctx.layer, ctx.scaling, ctx.shape = layer, scaling, x.shape
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:  # type: ignore[override]
        rows, down, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        # Both written so that the short side comes first, which float32 products run 3 times as fast.
        up = (b.T @ grad.T).mul_(ctx.scaling).T  # [rows, rank]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ transposed_weight(ctx.layer, grad.dtype).T
            grad_x = grad_x.addmm_(up, a).view(ctx.shape)
        return grad_x, (up.T @ rows).float(), (down.T @ grad).T.float().mul_(ctx.scaling), None, None
