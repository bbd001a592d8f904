"""Rotary position embedding (arXiv 2104.09864), in the halves layout of Llama and Qwen; alone, or with the cache write.

[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]        x1, x2 = halves of a head; cos, sin of position x frequency
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), cos and sin (T, D/2) or (B, T, D/2) -> x rotated. Rounds as Llama does: all in x's type."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)  # (..., T, 1, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rope_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: q (B, T, H, D), k (B, T, KV, D) at positions 0..T-1; cos and sin (P, D/2) -> q, k rotated."""
    T = q.size(1)
    return rotate(q, cos[:T], sin[:T]), rotate(k, cos[:T], sin[:T])


def rope_cache_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    lens: Tensor,
) -> Tensor:
    """The reference: row b's token t stands at position start[b] + t; k, v are written there for t < lens[b].

    q (B, T, H, D), k and v (B, T, KV, D), caches (B, KV, L, D) written in place, start and lens (B,) -> q rotated.
    """
    B, T = q.shape[:2]
    t = torch.arange(T, device=q.device)
    at = start[:, None] + t  # (B, T)
    safe = at.clamp(max=cos.size(0) - 1)  # padding may point past the table
    q, k = rotate(q, cos[safe], sin[safe]), rotate(k, cos[safe], sin[safe])
    b = torch.arange(B, device=q.device)
    if T == 1:
        k_cache[b, :, start] = k[:, 0]
        v_cache[b, :, start] = v[:, 0]
        return q
    real = t < lens[:, None]  # (B, T)
    rows, cols = b[:, None].expand(B, T)[real], at[real]
    k_cache[rows, :, cols] = k[real]
    v_cache[rows, :, cols] = v[real]
    return q


rope = rope_torch
rope_cache = rope_cache_torch
