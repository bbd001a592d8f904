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

from .launch import check, choose, target, tl, triton
from .place import Place
from .rope import check_table, config, inputs, turn
from .tools import measure


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
    turn(x, s_xh, p_q + (i_b * n_t + i_t) * H * D, D, cos, sin, True, H, D, Q_HEADS, HALF)
    turn(x + H * s_xh, s_xh, to, s_ch, cos, sin, real, KV, D, K_HEADS, HALF)
    i_head, i_col = tl.arange(0, K_HEADS)[:, None], tl.arange(0, 2 * HALF)[None, :]
    m = (i_head < KV) & (i_col < D) & real  # (K_HEADS, 2 HALF)
    v = tl.load(x + (H + KV + i_head) * s_xh + i_col, mask=m, other=0.0)
    tl.store(to + (KV + i_head) * s_ch + i_col, v, mask=m)


def rope_cache_triton(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The same on a GPU, in one launch; qkv stays as it is. ValueError if shapes or strides do not fit."""
    start, lens, cos, sin = place.start, place.lens, place.cos, place.sin
    (B, T, heads, D), (n_kv, L) = qkv.shape, cache.shape[1:3]
    lens = torch.full_like(start, T) if lens is None else lens
    fits = cache.shape == (B, n_kv, L, D) and n_kv % 2 == 0 and n_kv < heads
    check(fits, f"qkv {tuple(qkv.shape)} and cache {tuple(cache.shape)} do not fit")
    check(qkv.stride(3) == 1, "the columns of a head must be neighbours in qkv")
    check(cache.stride()[2:] == (D, 1), "the tokens of a head must be neighbours in the cache")
    check_table(cos, sin, D)
    check(
        start.shape == lens.shape == (B,), f"start {tuple(start.shape)}, lens {tuple(lens.shape)}: not ({B},)"
    )
    q = qkv.new_empty(B, T, heads - n_kv, D)
    _rope_cache[(T, B)](
        qkv, q, cache, cos, sin, start, lens, *qkv.stride()[:3], *cache.stride()[:2], T, L, cos.size(0),
        **config(heads - n_kv, n_kv // 2, D, target()),
    )  # fmt: skip
    return q


rope_cache = choose(rope_cache_torch, rope_cache_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Decoding of all seats, of a single row, and the prefill of a prompt."""
    for rows, n in ((m.seats, 1), (1, 1), (m.batch, m.length // 2)):
        yield _case(rows, n, m, device)


def _case(rows: int, n: int, m: measure.Model, device: str) -> measure.Case:
    qkv, cos, sin = inputs(rows, n, m, device)
    cache = torch.zeros(rows, 2 * m.kv_heads, 2 * m.context, m.head_dim, dtype=m.dtype, device=device)
    start = torch.full((rows,), m.context // 2, device=device)
    place = Place(start, n, cache.size(2), torch.full_like(start, n), cos, sin, m.dtype)
    return measure.Case(
        f"cache {rows} x {n} x ({m.heads} + 2 x {m.kv_heads}) x {m.head_dim}",
        lambda: rope_cache_triton(qkv, cache, place),
        {"torch, and a copy": lambda: rope_cache_torch(qkv.clone(), cache, place)},  # it turns them in place
        bytes=2 * qkv.nbytes,
    )


if __name__ == "__main__":
    measure.main("rope_cache")
