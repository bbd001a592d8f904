"""The loop shared by both attentions: a tile of queries against a range of keys, with a running softmax.

Scores are in base 2, x = q . k * log2(e) / sqrt(D), since the exponential of a GPU is exp2. For the keys so
far, the tile keeps for each query

    top = max x        total = sum 2^(x - top)        acc = sum 2^(x - top) v

and a block of keys with a higher maximum first shrinks them by 2^(top - new top). At the end o = acc / total;
lse = top + log2(total) is all else that a backward pass or a merge needs (arXiv 1805.02867, 2205.14135).

Not here: grids, lengths, and the choice of keys (attention.py, cached_attention.py).
"""

from .launch import tl, triton

LOG2E = 1.4426950408889634


@triton.jit
def load_rows(p_x, at, m_row, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of D at p_x + at (R,) -> (R, BD); zeros past D and, unless WHOLE, where m_row (R,) is off."""
    i_d = tl.arange(0, BD)
    p_tile = p_x + at[:, None] + i_d[None, :]
    if WHOLE and D == BD:
        x = tl.load(p_tile)
    elif WHOLE:
        x = tl.load(p_tile, mask=i_d[None, :] < D, other=0.0)
    else:
        x = tl.load(p_tile, mask=m_row[:, None] & (i_d < D)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(p_x, x, at, m_row, D: tl.constexpr, BD: tl.constexpr):
    """Store x (R, BD) to the rows of D at p_x + at (R,), where m_row (R,) is on, in the type of p_x."""
    i_d = tl.arange(0, BD)
    m = m_row[:, None] & (i_d < D)[None, :]
    tl.store(p_x + at[:, None] + i_d[None, :], x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def attend(
    acc, total, top, q, i_at, p_k, p_v, s_k, s_v, first, last, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    p_table=None, s_page=0, P: tl.constexpr = 1,
):  # fmt: skip
    """Add the keys first..last-1 to acc (BM, BD), total, top (BM,), for q (BM, BD) at positions i_at (BM,).

    p_k, p_v point at key 0 of one head, whose keys lie s_k, s_v elements apart; scale = log2(e) / sqrt(D).
    Not MASKED: every query sees every key; last - first is a multiple of BN. MASKED: a query sees the keys up
    to its own position; keys from `last` on read as zeros, for 0 times what may be NaN there would be NaN.
    With p_table: key n is key n % P of page p_table[n // P]; pages lie s_page apart; P is a multiple of BN.
    """
    i_n = tl.arange(0, BN)
    for n in range(first, last, BN):
        at_k, at_v = n * s_k, n * s_v
        if p_table is not None:
            page = tl.load(p_table + n // P).to(tl.int64) * s_page
            at_k, at_v = page + n % P * s_k, page + n % P * s_v
        k = load_rows(p_k + at_k, i_n * s_k, n + i_n < last, D, BD, not MASKED)  # (BN, BD)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
        if MASKED:
            x = tl.where((i_at[:, None] >= n + i_n[None, :]) & (n + i_n < last)[None, :], x, float("-inf"))
        high = tl.maximum(top, tl.max(x, 1) * scale)  # (BM,)
        p = tl.exp2(x * scale - high[:, None])  # (BM, BN)
        shrink = tl.exp2(top - high)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(p_v + at_v, i_n * s_v, n + i_n < last, D, BD, not MASKED)  # (BN, BD)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = high
    return acc, total, top
