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
from .rope import check_fit, config, inputs, turn


def rope_cache_torch(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The reference: k and v are written where the tokens stand; padding is not.

    qkv (B, T, H + 2 KV, D), the heads of q, k and v side by side: used up, for q and k are turned in place.
    cache (B, 2 KV, L, D), the heads of k and v: written in place -> q (B, T, H, D).
    """
    (heads, D), n_kv = qkv.shape[2:], cache.size(1)
    cos, sin = place.angles
    turned = qkv[:, :, : heads - n_kv // 2]
    crossed = torch.roll(turned, D // 2, -1).mul_(sin)  # as `rotate`
    turned.mul_(cos).add_(crossed)
    kv = qkv[:, :, heads - n_kv :]
    if place.T == 1 and place.lens is None:
        cache[place.rows, :, place.start] = kv[:, 0]
    else:
        rows, tokens, at = place.real
        cache[rows, :, at] = kv[rows, tokens]
    return qkv[:, :, : heads - n_kv]


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


def rope_cache_triton(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The same on a GPU, in one launch; qkv stays as it is. ValueError if shapes or strides do not fit."""
    shapes = f"qkv {tuple(qkv.shape)}, cache {tuple(cache.shape)}"
    check(qkv.size(2) > cache.size(1), f"{shapes}: no heads are left for q")
    KV = cache.size(1) // 2
    q, k, v = qkv.split((qkv.size(2) - 2 * KV, KV, KV), 2)
    k_cache, v_cache = cache.chunk(2, 1)
    start, cos, sin = place.start, place.cos, place.sin
    lens = torch.full_like(start, q.size(1)) if place.lens is None else place.lens
    check_fit(q, k, cos, sin)
    (B, T, H, D), L = q.shape, cache.size(2)
    check(cache.shape == (B, 2 * KV, L, D), f"{shapes} do not fit")
    check(cache.stride()[2:] == (D, 1), "the tokens of a head must be neighbours in the cache")
    check(
        start.shape == lens.shape == (B,), f"start {tuple(start.shape)}, lens {tuple(lens.shape)}: not ({B},)"
    )
    q_out = q.new_empty(q.shape)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cache.stride()[:2])
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
    qkv = torch.cat((q, k, v), 2)
    cache = torch.zeros(rows, 2 * m.kv_heads, 2 * m.context, m.head_dim, dtype=m.dtype, device=device)
    start = torch.full((rows,), m.context // 2, device=device)
    place = Place(start, n, cache.size(2), torch.full_like(start, n), cos, sin, m.dtype)
    args = (qkv, cache, place)
    return measure.Case(
        f"cache {rows} x {n} x ({m.heads} + 2 x {m.kv_heads}) x {m.head_dim}",
        lambda: rope_cache_triton(*args),
        {"torch": lambda: rope_cache_torch(qkv.clone(), cache, place)},  # it turns them in place
        bytes=2 * (q.numel() + 2 * k.numel()) * q.element_size(),
    )


if __name__ == "__main__":
    measure.main("rope_cache")
