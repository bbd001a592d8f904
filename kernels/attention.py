"""Causal attention over right-padded rows, for training.

    o[b, t, h] = sum_{s <= t} softmax_s( q[b, t, h] . k[b, s, h / G] / sqrt(D) ) v[b, s, h / G]        G = H / KV

Rows are right-padded, so causality already hides the padding from every real token; `lengths` only says which outputs
are padding (they are zero, and so are their gradients).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_torch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The reference: q (B, T, H, D), k and v (B, T, KV, D), lengths (B,) -> o (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(
        1, 2
    )
    if lengths is None:
        return o
    real = torch.arange(o.size(1), device=o.device) < lengths[:, None]  # (B, T)
    return o.masked_fill(~real[:, :, None, None], 0)


attention = attention_torch
