"""Attention of new tokens against the seat cache, for decoding (T = 1) and extension (T > 1).

    o[b, t, h] = sum_{s <= start[b] + t} softmax_s( q[b, t, h] . k[b, h / G, s] / sqrt(D) ) v[b, h / G, s]

k and v are views of the cache, (B, KV, L, D), whose rows may have any length; what lies beyond a row's last token is
whatever an earlier tenant of the seat left there, and is never looked at.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention_torch(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """The reference: q (B, T, H, D), k and v (B, KV, L, D), start (B,) -> o (B, T, H, D)."""
    B, T, H, D = q.shape
    KV, L = k.size(1), k.size(2)
    at = start[:, None] + torch.arange(T, device=q.device)  # (B, T) the position of each query
    seen = torch.arange(L, device=q.device) <= at[:, :, None]  # (B, T, L)
    if T > 1:
        seen = seen[:, None]  # (B, 1, T, L)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen, enable_gqa=H != KV).transpose(
            1, 2
        )
    grouped = q.view(
        B, KV, H // KV, D
    )  # the heads of a group are the rows of one matrix: no key is read twice
    seen = seen.view(B, 1, 1, L).expand(B, KV, H // KV, L)
    return F.scaled_dot_product_attention(grouped, k, v, seen).reshape(B, 1, H, D)


cached_attention = cached_attention_torch
