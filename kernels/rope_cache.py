"""RoPE and the cache write in one launch, for decoding and prefill: rotate q and k, store k and v.

    q[b, t] -> rotate(q[b, t], i)      k_cache[b, :, i] = rotate(k[b, t], i)      v_cache[b, :, i] = v[b, t]

with i = start[b] + t. Rotation and rounding are those of rope.py. Rows have lengths of their own: tokens from
lens[b] on are padding, which is not written and may be past the end of the seat and of the table. A program
handles all heads of a token, as in rope.py, but k goes straight into the cache: k and v are moved once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import check, check_fit, choose, tl, triton
from .place import Place
from .rope import check_table, config, inputs, rotate_heads
from .tools import measure


def rope_cache_torch(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The reference: k and v are written at the positions of their tokens, but for padding.

    qkv (B, T, H + 2 KV, D), the heads of q, k and v side by side: overwritten, as q and k rotate in place.
    cache (B, 2 KV, L, D), the heads of k and v: written in place -> q (B, T, H, D).
    """
    (heads, D), n_kv = qkv.shape[2:], cache.size(1)
    cos, sin = place.angles
    rotated = qkv[:, :, : heads - n_kv // 2]
    crossed = torch.roll(rotated, D // 2, -1).mul_(sin)  # as `rotate`, in place
    rotated.mul_(cos).add_(crossed)
    kv = qkv[:, :, heads - n_kv :]
    if place.T == 1 and place.lens is None:
        cache[place.rows, :, place.start] = kv[:, 0]
    else:
        rows, tokens, at = place.real
        cache[rows, :, at] = kv[rows, tokens]
    return qkv[:, :, : heads - n_kv]


@triton.jit
def _rope_cache(
    p_x, p_q, p_cache, p_cos, p_sin, p_start, p_lens,
    s_xb, s_xt, s_xh, s_cb, s_ch, n_t, n_cache, n_positions,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(p_start + i_b) + i_t
    real = (i_t < tl.load(p_lens + i_b)) & (position < n_cache)
    i_col = tl.arange(0, HALF)[None, :]
    at = tl.minimum(position, n_positions - 1) * (D // 2) + i_col
    cos = tl.load(p_cos + at, mask=i_col < D // 2, other=0.0)
    sin = tl.load(p_sin + at, mask=i_col < D // 2, other=0.0)
    x, to = p_x + i_b * s_xb + i_t * s_xt, p_cache + i_b * s_cb + position * D
    rotate_heads(x, s_xh, p_q + (i_b * n_t + i_t) * H * D, D, cos, sin, True, H, D, Q_HEADS, HALF)
    rotate_heads(x + H * s_xh, s_xh, to, s_ch, cos, sin, real, KV, D, K_HEADS, HALF)
    i_head, i_col = tl.arange(0, K_HEADS)[:, None], tl.arange(0, 2 * HALF)[None, :]
    m = (i_head < KV) & (i_col < D) & real  # (K_HEADS, 2 HALF)
    v = tl.load(x + (H + KV + i_head) * s_xh + i_col, mask=m, other=0.0)
    tl.store(to + (KV + i_head) * s_ch + i_col, v, mask=m)


def rope_cache_triton(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The same on a GPU, in one launch; qkv is not changed. ValueError if shapes or strides do not fit."""
    start, lens, cos, sin = place.start, place.lens, place.cos, place.sin
    (B, T, heads, D), (n_kv, L) = qkv.shape, cache.shape[1:3]
    lens = torch.full_like(start, T) if lens is None else lens
    fits = cache.shape == (B, n_kv, L, D) and n_kv % 2 == 0 and n_kv < heads
    fits = fits and start.shape == lens.shape == (B,)
    check_fit(fits, qkv=qkv, cache=cache, start=start, lens=lens)
    check(qkv.stride(3) == 1, "the columns of a head must be contiguous in qkv")
    check(cache.stride()[2:] == (D, 1), "the tokens of a head must be contiguous in the cache")
    check_table(cos, sin, D)
    q = qkv.new_empty(B, T, heads - n_kv, D)
    strides, c = (*qkv.stride()[:3], *cache.stride()[:2]), config(heads - n_kv, n_kv // 2, D)
    _rope_cache[(T, B)](qkv, q, cache, cos, sin, start, lens, *strides, T, L, cos.size(0), **c)
    return q


rope_cache = choose(rope_cache_torch, rope_cache_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Decoding of all seats, of a single row, and the prefill of a prompt."""
    rivals = {"torch, and a copy": lambda qkv, *rest: rope_cache_torch(qkv.clone(), *rest)}  # works in place
    for rows, n in ((m.seats, 1), (1, 1), (m.batch, m.length // 2)):
        qkv, cos, sin = inputs(rows, n, m, device)
        cache = torch.zeros(rows, 2 * m.kv_heads, 2 * m.context, m.head_dim, dtype=m.dtype, device=device)
        start = torch.full((rows,), m.context // 2, device=device)
        place = Place(start, n, cache.size(2), torch.full_like(start, n), cos, sin, m.dtype)
        name = f"cache {rows} x {n} x ({m.heads} + 2 x {m.kv_heads}) x {m.head_dim}"
        yield measure.versus(name, rope_cache_triton, rivals, qkv, cache, place, bytes=2 * qkv.nbytes)
