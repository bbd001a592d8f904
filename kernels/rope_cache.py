"""RoPE and the cache write in one launch, for decoding and prefill: q and k turned, k and v to their seat.

    q[b, t] -> q[b, t] turned by start[b] + t         k_cache[b, :, start[b] + t] = k[b, t] turned alike
                                                      v_cache[b, :, start[b] + t] = v[b, t]

The rotation and its rounding are those of rope.py. Rows have lengths of their own: tokens from lens[b] on are
padding, which is not written and may point past the seat and the table. A program takes a token with all its
heads, as in rope.py; unlike there k's way out is the cache, so k and v are read and written once.

    python -m kernels.rope_cache        the benchmark
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import measure
from .launch import check, choose, target, tl, triton
from .place import Place
from .rope import check_fit, config, contiguous_columns, inputs, rotate, turn


def rope_cache_torch(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, place: Place
) -> Tensor:
    """The reference: k and v are written where the tokens stand; padding is not.

    q (B, T, H, D), k and v (B, T, KV, D), caches (B, KV, L, D) written in place -> q.
    """
    angles = place.angles
    q, k = rotate(q, *angles), rotate(k, *angles)
    if place.T == 1 and place.lens is None:
        b = place.rows
        k_cache[b, :, place.start] = k[:, 0]
        v_cache[b, :, place.start] = v[:, 0]
        return q
    rows, tokens, at = place.real
    k_cache[rows, :, at] = k[rows, tokens]
    v_cache[rows, :, at] = v[rows, tokens]
    return q


@triton.jit
def _rope_cache(
    p_q, p_k, p_v, p_q_out, p_k_cache, p_v_cache, p_cos, p_sin, p_start, p_lens,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_cb, s_ch, n_t, n_cache, n_positions,
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
    q, k = p_q + i_b * s_qb + i_t * s_qt, p_k + i_b * s_kb + i_t * s_kt
    to = i_b * s_cb + position * D
    turn(q, s_qh, p_q_out + (i_b * n_t + i_t) * H * D, D, cos, sin, True, H, D, Q_HEADS, HALF)
    turn(k, s_kh, p_k_cache + to, s_ch, cos, sin, real, KV, D, K_HEADS, HALF)
    i_head, i_col = tl.arange(0, K_HEADS)[:, None], tl.arange(0, 2 * HALF)[None, :]
    m = (i_head < KV) & (i_col < D) & real  # (K_HEADS, 2 HALF)
    v = tl.load(p_v + i_b * s_vb + i_t * s_vt + i_head * s_vh + i_col, mask=m, other=0.0)
    tl.store(p_v_cache + to + i_head * s_ch + i_col, v, mask=m)


def rope_cache_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, place: Place
) -> Tensor:
    """The same on a GPU, in one launch. ValueError if shapes or the caches' strides do not fit."""
    start, cos, sin = place.start, place.cos, place.sin
    lens = torch.full_like(start, q.size(1)) if place.lens is None else place.lens
    check_fit(q, k, cos, sin)
    (B, T, H, D), KV, L = q.shape, k.size(2), k_cache.size(2)
    check(v.shape == k.shape, f"k {tuple(k.shape)} and v {tuple(v.shape)} differ")
    check(
        k_cache.shape == v_cache.shape == (B, KV, L, D),
        f"cache {tuple(k_cache.shape)} for k {tuple(k.shape)}",
    )
    check(k_cache.stride() == v_cache.stride(), "the caches of k and v must be laid out alike")
    check(k_cache.stride()[2:] == (D, 1), "the tokens of a head must be neighbours in the cache")
    check(
        start.shape == lens.shape == (B,), f"start {tuple(start.shape)}, lens {tuple(lens.shape)}: not ({B},)"
    )
    q, k, v = contiguous_columns(q), contiguous_columns(k), contiguous_columns(v)
    q_out = q.new_empty(q.shape)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:2])
    _rope_cache[(T, B)](
        q, k, v, q_out, k_cache, v_cache, cos, sin, start, lens, *strides, T, L, cos.size(0),
        **config(H, KV, D, target()),
    )  # fmt: skip
    return q_out


rope_cache = choose(rope_cache_torch, rope_cache_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Decoding of all seats, of a single row, and the prefill of a prompt."""
    for rows, n in ((m.seats, 1), (1, 1), (m.batch, m.length // 2)):
        yield _case(rows, n, m, device)


def _case(rows: int, n: int, m: measure.Model, device: str) -> measure.Case:
    q, k, v, cos, sin = inputs(rows, n, m, device)
    cache = torch.zeros(2, rows, m.kv_heads, 2 * m.context, m.head_dim, dtype=m.dtype, device=device)
    start = torch.full((rows,), m.context // 2, device=device)
    place = Place(start, n, cache.size(3), torch.full_like(start, n), cos, sin, m.dtype)
    args = (q, k, v, *cache, place)
    return measure.Case(
        f"cache {rows} x {n} x ({m.heads} + 2 x {m.kv_heads}) x {m.head_dim}",
        lambda: rope_cache_triton(*args),
        {"torch": lambda: rope_cache_torch(*args)},
        bytes=2 * (q.numel() + 2 * k.numel()) * q.element_size(),
    )


if __name__ == "__main__":
    measure.main("rope_cache")
