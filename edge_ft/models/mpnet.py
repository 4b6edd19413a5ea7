"""MPNet's attention through transformers' attention interface: its own module does not use it."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

__all__ = ["use_attention_interface"]


class _Attention(MPNetSelfAttention):
    """The same function; the model's position bias is added to the mask."""

    config: Any
    is_causal = False

    def forward(  # type: ignore[override]
        self, hidden: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor]:
        """Return attention of [batch, seq, hidden], in the same shape; position_bias is [batch, heads, seq, seq]."""
        split = (*hidden.shape[:-1], -1, self.attention_head_size)
        query, key, value = (layer(hidden).view(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = position_bias
        if bias is not None and attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
            else:
                bias = bias + attention_mask
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        output, _weights = attend(
            self, query, key, value, bias, dropout=dropout, scaling=self.attention_head_size**-0.5
        )
        return (self.o(output.flatten(2)),)


def use_attention_interface(model: Any) -> None:
    """Let an MPNet follow `model.set_attn_implementation`, in place."""
    for module in model.modules():
        if type(module) is MPNetSelfAttention:
            module.__class__ = _Attention
            module.config = model.config
    model._supports_sdpa = True
    model._can_set_attn_implementation = lambda: True  # transformers looks for it in the module's source
