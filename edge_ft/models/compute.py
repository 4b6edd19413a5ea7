"""How a training step is computed: its numbers, what is fused into one operation, and what is kept of it.

A PEFT model with `Compute` gives the same as without, up to rounding, for less time and memory:

- attention over short sequences keeps no scores (`edge_ft.models.short_attention`);
- frozen and low-rank product of an adapted layer are one operation, which keeps its input alone;
- RMSNorm keeps its input and one number a row, a gated unit its two inputs, instead of every intermediate; what they
  give is made again where the adapted products behind them want it;
- in bfloat16 all that lies between the embedding and the head is held and multiplied in it, while
  normalisation and loss are computed in float32 and the trained parameters stay float32;
- with memory `high` frozen layers keep the float weights that their codes stand for;
- with memory `low` only the inputs of the transformer layers are kept (Chen et al., arXiv:1604.06174).
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

from edge_ft.config import Memory
from edge_ft.families import Family
from edge_ft.models.rms_norm import plain_rms_norm
from edge_ft.models.short_attention import use_short_attention
from edge_ft.quant.layers import FrozenLinear, Kept, stack_names, transposed_weight

__all__ = ["Compute", "give_freed_memory_back"]

MadeOf = tuple[Tensor, Callable[[Tensor], Tensor]]
"""A tensor, and what makes of it the input of an adapted layer."""


class Compute:
    """Inside, `model` computes in `dtype`, fused, and recomputes its layers if told so."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype, memory: Memory) -> None:
        self.dtype = dtype
        self.active = False
        self._normed: tuple[Tensor, MadeOf] | None = None
        """What the last norm gave, and what it can be made of again."""
        self._again: tuple[Tensor, Tensor, Tensor] | None = None
        """Input and weight of the norm that was last made again, and what it gave: several layers read it."""
        self._frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)] if memory == "high" else []
        self.keep(dtype)
        give_freed_memory_back(memory == "low")
        task_model = model.get_base_model()
        stacks = [task_model.get_submodule(stack) for stack in stack_names(task_model, family)]
        use_short_attention(task_model)
        for layers in stacks:
            for layer in layers:
                layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True)
                if memory == "low":
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
        self.active, self._normed, self._again = False, None, None

    def keep(self, dtype: torch.dtype | None) -> None:
        """With memory `high`: keep the frozen weights in this dtype from now on, and no other ones; None: none."""
        for layer in self._frozen:
            layer.kept = None if dtype is None else Kept(dtype)

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

        def forward(x: Tensor) -> Tensor:
            if not self.active:
                return plain(x)
            y: Tensor = _RMSNorm.apply(x, weight, eps)
            if x.dim() == 3:  # not of a head's queries and keys (Qwen 3), which come in between
                self._normed = y, (x, again)
            return y

        def again(x: Tensor) -> Tensor:
            last = self._again
            if last is None or last[0].data_ptr() != x.data_ptr() or last[1] is not weight:
                self._again = last = x, weight, _rms_norm(x, weight, eps)[0]
            return last[2]

        norm.forward = forward

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
            gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
            adapter = self._adapter(down)
            y: Tensor = (
                down(_SwiGLU.apply(gate, up))
                if adapter is None
                else _GatedLoraMatMul.apply(gate, up, *adapter, down.base_layer)
            )
            return y

        mlp.forward = forward

    def _fuse_lora(self, layer: Any) -> None:
        plain = layer.forward

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            adapter = self._adapter(layer)
            if adapter is None:
                return plain(x, *arguments, **keywords)
            made_of = self._normed[1] if self._normed is not None and self._normed[0] is x else None
            y: Tensor = _LoraMatMul.apply(x, *adapter, layer.base_layer, made_of)
            return y

        layer.forward = forward

    def _adapter(self, layer: Any) -> tuple[Tensor, Tensor, float] | None:
        """A, B and scaling of a layer, where they are all that it adds to its frozen product now."""
        if not (self.active and hasattr(layer, "lora_A") and isinstance(layer.base_layer, nn.Linear)):
            return None
        name = layer.active_adapters[0]
        if layer.disable_adapters or layer.merged or layer.lora_variant:
            return None
        if layer.training and getattr(layer.lora_dropout[name], "p", 0):
            return None
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]

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
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        wide = grad.float() * weight
        wide -= normed.mul_((wide * normed).mean(-1, keepdim=True))
        return wide.mul_(scale).to(x.dtype), None, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x, in its dtype, and 1 / sqrt(mean(x²) + eps) of each row in float32."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


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
    """x Wᵀ + bias + scaling · x Aᵀ Bᵀ over a frozen layer, as one operation that keeps x or what that is made of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear, made_of: MadeOf | None
    ) -> Tensor:
        rows, a, b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        y, down = _lora_product(rows, a, b, scaling, layer)
        kept, ctx.again = made_of or (x, None)
        ctx.save_for_backward(kept, down, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, down, a, b = ctx.saved_tensors
        if ctx.again is not None:
            x = ctx.again(x)
        grad = grad.flatten(0, -2)
        up, grad_a, grad_b = _lora_gradients(grad, x.flatten(0, -2), down, b, ctx.scaling)
        grad_x = _input_gradient(grad, up, a, ctx.layer).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_b, None, None, None


class _GatedLoraMatMul(torch.autograd.Function):
    """`_LoraMatMul` of silu(gate) · up, which keeps these two and makes their product again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear) -> Tensor:
        rows, a, b = nn.functional.silu(gate).mul_(up).flatten(0, -2), a.to(up.dtype), b.to(up.dtype)
        y, down = _lora_product(rows, a, b, scaling, layer)
        ctx.save_for_backward(gate, up, down, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return y.unflatten(0, up.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        gate, up, down, a, b = ctx.saved_tensors
        grad, shape = grad.flatten(0, -2), gate.shape
        gate, up = gate.flatten(0, -2), up.flatten(0, -2)
        unit = nn.functional.silu(gate)
        short, grad_a, grad_b = _lora_gradients(grad, unit * up, down, b, ctx.scaling)
        inner = _input_gradient(grad, short, a, ctx.layer)
        grad_up = unit.mul_(inner).view(shape)
        return torch.ops.aten.silu_backward(inner.mul_(up), gate).view(shape), grad_up, grad_a, grad_b, None, None


def _lora_product(rows: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """The layer's output [rows, out], and what A makes of its input [rows, rank]."""
    weight = transposed_weight(layer, rows.dtype)
    y = rows @ weight if layer.bias is None else torch.addmm(layer.bias.to(rows.dtype), rows, weight)
    down = rows @ a.T
    return y.addmm_(down, b.T, alpha=scaling), down


def _lora_gradients(
    grad: Tensor, rows: Tensor, down: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of what A made [rows, rank], of A and of B."""
    # Both written so that the short side comes first, which float32 products run 3 times as fast.
    up = (b.T @ grad.T).mul_(scaling).T
    return up, (up.T @ rows).float(), (down.T @ grad).T.float().mul_(scaling)


def _input_gradient(grad: Tensor, up: Tensor, a: Tensor, layer: nn.Linear) -> Tensor:
    """The gradient of a layer's input [rows, in]."""
    return (grad @ transposed_weight(layer, grad.dtype).T).addmm_(up, a)
