"""Multi-head self-attention over tokens, through diffusers' attention dispatcher.

That buys what users know from diffusers models: `set_attention_backend`, `fuse_qkv_projections`,
and LoRA targets named to_q, to_k, to_v, to_out.0.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from flowkit.errors import FlowkitError

__all__ = ["SelfAttention", "SelfAttentionProcessor"]


class SelfAttentionProcessor:
    """Plain scaled dot-product attention; holds the backend that the user chose."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: SelfAttention, hidden_states: Tensor) -> Tensor:
        """hidden_states: (B, N, dim).  Returns (B, N, dim)."""
        if attn.fused_projections:
            rows = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            rows = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (row.unflatten(-1, (attn.heads, -1)) for row in rows)
        out = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(2).to(query.dtype))


class SelfAttention(nn.Module, AttentionModuleMixin):
    """softmax(q k^T / sqrt(dim / heads)) v with a linear map before and after, all with bias."""

    _default_processor_cls: Any = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]
    _supports_qkv_fusion = True

    processor: Any  # what set_processor may replace
    to_qkv: nn.Linear  # made by fuse_projections

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise FlowkitError(
                f"the number of attention heads must divide the width, got {heads} and {dim}"
            )
        self.heads, self.use_bias = heads, True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, as LoRA targets expect
        self.processor = SelfAttentionProcessor()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (B, N, dim).  Returns (B, N, dim)."""
        return self.processor(self, hidden_states)
