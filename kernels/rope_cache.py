"""RoPE and the cache write in one launch, for decoding and prefill: rotate q and k, store k and v.

    q[b, t] -> rotate(q[b, t], i)      k_cache[b, :, i] = rotate(k[b, t], i)      v_cache[b, :, i] = v[b, t]

with i = start[b] + t, in the page that the table says (place.py). Rotation and rounding are those of rope.py.
Rows have lengths of their own: tokens from lens[b] on are padding, which is not written and may lie past the
end of the seat and of the cosines. A program handles all heads of a token, as in rope.py, but k goes straight
into the cache: k and v are moved once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import cdiv, check, check_fit, choose, tl, triton
from .place import Place
from .rope import check_table, config, inputs, rotate_heads
from .tools import measure


def rope_cache_torch(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The reference: k and v are written at the positions of their tokens, except for padding.

    qkv (B, T, H + 2 KV, D), the heads of q, k and v side by side: overwritten, as q and k rotate in place.
    cache (pages, 2 KV, P, D), the heads of k and v: written in place -> q (B, T, H, D).
    """
    (heads, D), (n_kv, P) = qkv.shape[2:], cache.shape[1:3]
    cos, sin = place.angles
    rotated = qkv[:, :, : heads - n_kv // 2]
    crossed = torch.roll(rotated, D // 2, -1).mul_(sin)  # as `rotate`, in place
    rotated.mul_(cos).add_(crossed)
    kv = qkv[:, :, heads - n_kv :]
    if place.T == 1 and place.lens is None:
        page, at = place.slots(place.rows, place.start, P)
        cache[page, :, at] = kv[:, 0]
    else:
        rows, tokens, at = place.real
        page, at = place.slots(rows, at, P)
        cache[page, :, at] = kv[rows, tokens]
    return qkv[:, :, : heads - n_kv]


@triton.jit
def _rope_cache(
    p_x, p_q, p_cache, p_cos, p_sin, p_start, p_lens, p_table,
    s_xb, s_xt, s_xh, s_page, s_ch, s_table, n_t, n_pages, n_positions,
    P: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(p_start + i_b) + i_t
    real = (i_t < tl.load(p_lens + i_b)) & (position < n_pages * P)
    page = tl.load(p_table + i_b * s_table + position // P, mask=real, other=0).to(tl.int64)
    i_col = tl.arange(0, HALF)[None, :]
    at = tl.minimum(position, n_positions - 1) * (D // 2) + i_col
    cos = tl.load(p_cos + at, mask=i_col < D // 2, other=0.0)
    sin = tl.load(p_sin + at, mask=i_col < D // 2, other=0.0)
    x, to = p_x + i_b * s_xb + i_t * s_xt, p_cache + page * s_page + position % P * D
    rotate_heads(x, s_xh, p_q + (i_b * n_t + i_t) * H * D, D, cos, sin, True, H, D, Q_HEADS, HALF)
    rotate_heads(x + H * s_xh, s_xh, to, s_ch, cos, sin, real, KV, D, K_HEADS, HALF)
    i_head, i_col = tl.arange(0, K_HEADS)[:, None], tl.arange(0, 2 * HALF)[None, :]
    m = (i_head < KV) & (i_col < D) & real  # (K_HEADS, 2 HALF)
    v = tl.load(x + (H + KV + i_head) * s_xh + i_col, mask=m, other=0.0)
    tl.store(to + (KV + i_head) * s_ch + i_col, v, mask=m)


def rope_cache_triton(qkv: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The same on a GPU, in one launch; qkv is not changed. ValueError if shapes or strides do not fit."""
    start, lens, cos, sin = place.start, place.lens, place.cos, place.sin
    (B, T, heads, D), (n_kv, P), table = qkv.shape, cache.shape[1:3], place.pages
    lens = torch.full_like(start, T) if lens is None else lens
    fits = cache.size(3) == D and n_kv % 2 == 0 and n_kv < heads and start.shape == lens.shape == (B,)
    fits = fits and (len(table) == B if table is place.table else len(cache) == B)
    check_fit(fits, qkv=qkv, cache=cache, start=start, lens=lens, table=table)
    check(qkv.stride(3) == 1, "the columns of a head must be contiguous in qkv")
    check(cache.stride()[2:] == (D, 1), "the tokens of a head must be contiguous in the cache")
    check_table(cos, sin, D)
    q = qkv.new_empty(B, T, heads - n_kv, D)
    strides = (*qkv.stride()[:3], *cache.stride()[:2], table.stride(0))
    blocks = config(heads - n_kv, n_kv // 2, D)
    _rope_cache[(T, B)](
        qkv, q, cache, cos, sin, start, lens, table, *strides, T, table.size(1), cos.size(0), P=P, **blocks
    )
    return q


rope_cache = choose(rope_cache_torch, rope_cache_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Decoding of all seats, of a single row, and the prefill of a prompt, in pages of 64."""
    rivals = {"torch, and a copy": lambda qkv, *rest: rope_cache_torch(qkv.clone(), *rest)}  # works in place
    for rows, n in ((m.seats, 1), (1, 1), (m.batch, m.length // 2)):
        qkv, cos, sin = inputs(rows, n, m, device)
        pages = rows * cdiv(2 * m.context, 64)
        cache = torch.zeros(pages, 2 * m.kv_heads, 64, m.head_dim, dtype=m.dtype, device=device)
        table = torch.randperm(pages, dtype=torch.int32, device=device).view(rows, -1)
        start = torch.full((rows,), m.context // 2, device=device)
        lens, L = torch.full_like(start, n), table.size(1) * 64
        place = Place(start, n, L, lens, cos, sin, m.dtype, table)
        name = f"cache {rows} x {n} x ({m.heads} + 2 x {m.kv_heads}) x {m.head_dim}"
        yield measure.versus(name, rope_cache_triton, rivals, qkv, cache, place, bytes=2 * qkv.nbytes)
