"""Attention of new tokens against the cache: decoding (T = 1), extension and prefill (T > 1).

    o[b, t, h] = sum_{s <= start[b] + t} softmax_s(q[b, t, h] . k[b, h / G, s] / sqrt(D)) v[b, h / G, s]

k and v of row b are in the pages of the cache that a table names (place.py). A row holds any number of
tokens; what lies beyond its last real one, in its last page or in pages of other rows, is not read.

One kernel decodes, extends and prefills. The rows of a tile are the (token, query head) pairs of one key
head, so that a key is read once for its whole group; decoding is T = 1, G rows. If rows and heads alone would
leave processors idle, the keys are split into chunks with programs of their own, whose results a second
kernel merges (flash decoding):

    o = sum_c 2^(lse_c - lse) o_c        lse = log2 sum_c 2^lse_c

The grid depends on shapes alone, never on start, so that a CUDA graph can hold the launch; a chunk past the
end of its row loads nothing. Chunks are of one size, so that a long row gets more programs than a short one.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import check_heads
from .launch import Target, cdiv, check, check_fit, choose, next_power_of_2, target, tl, triton
from .online_softmax import LOG2E, attend, load_rows, store_rows
from .place import Place
from .tools import measure


def cached_attention_torch(q: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The reference: q (B, T, H, D), cache (pages, 2 KV, P, D) -> o (B, T, H, D). It gathers the pages."""
    B, T, H, D = q.shape
    if place.table is not None:
        cache = cache[place.table].transpose(1, 2).flatten(2, 3)
    k, v = cache.chunk(2, 1)  # (B, KV, L, D)
    KV = k.size(1)
    if T > 1:
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, place.mask, enable_gqa=H != KV)
        return o.transpose(1, 2)
    grouped = q.view(B, KV, H // KV, D)  # a group's heads are the rows of one matrix: no key is read twice
    return F.scaled_dot_product_attention(grouped, k, v, place.mask).reshape(B, 1, H, D)


@triton.jit
def _cached(
    p_q, p_cache, p_table, p_start, p_lens, p_o, p_lse,
    s_qb, s_qt, s_qh, s_page, s_ch, s_table, s_oc, s_ob, s_ot, s_oh, T, L, chunk, scale,
    P: tl.constexpr, KV: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (B KV, chunks, T G / BM): o (chunks, B, T, H, D) and lse (chunks, B, T, H), base 2 (or None)."""
    b, kv = (tl.program_id(0) // KV).to(tl.int64), tl.program_id(0) % KV
    c, m = tl.program_id(1), (tl.num_programs(2) - 1 - tl.program_id(2)) * BM
    i_row = m + tl.arange(0, BM)
    i_t, i_h = i_row // G, kv * G + i_row % G
    start = tl.load(p_start + b).to(tl.int32)
    last_t = (tl.minimum(m + BM, T * G) - 1) // G  # of the tile's queries
    n_new = last_t + 1
    if p_lens is not None:  # a row's padding sees no more than its last token does
        n_new = tl.minimum(n_new, tl.load(p_lens + b).to(tl.int32))
    n_keys = tl.maximum(tl.minimum(start + n_new, L), 1)  # that any of them sees
    first = c * chunk
    last = tl.minimum(first + chunk, n_keys)
    whole = tl.minimum(start + m // G + 1, n_keys) // BN * BN  # that all of them see, in whole blocks
    whole = tl.minimum(tl.maximum(whole, first), last)
    p_k, p_v = p_cache + kv * s_ch, p_cache + (KV + kv) * s_ch
    p_table += b * s_table
    m_row = (i_row < T * G) & (first < last)
    q = load_rows(p_q + b * s_qb, i_t * s_qt + i_h * s_qh, m_row, D, BD, False)  # (BM, BD)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -1e30, tl.float32)
    i_at = start + i_t
    acc, total, top = attend(
        acc, total, top, q, i_at, p_k, p_v, D, D, first, whole, scale, D, BD, BN, False, p_table, s_page, P
    )
    acc, total, top = attend(
        acc, total, top, q, i_at, p_k, p_v, D, D, whole, last, scale, D, BD, BN, True, p_table, s_page, P
    )
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(p_o + c.to(tl.int64) * s_oc + b * s_ob, o, i_t * s_ot + i_h * s_oh, m_row, D, BD)
    if p_lse is not None:
        i_lse = ((c * (tl.num_programs(0) // KV) + b) * T + i_t) * KV * G + i_h
        tl.store(p_lse + i_lse, top + tl.log2(total), mask=i_row < T * G)


@triton.jit
def _merge(p_part, p_lse, p_o, n_chunks, n_rows, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """Grid (B T H): o (rows, D) of one row from its partial o (chunks, rows, D) and lse (chunks, rows)."""
    row = tl.program_id(0).to(tl.int64)
    i_c, i_d = tl.arange(0, BC), tl.arange(0, BD)
    lse = tl.load(p_lse + i_c * n_rows + row, mask=i_c < n_chunks, other=float("-inf"))  # (BC,)
    weight = tl.exp2(lse - tl.max(lse, 0))
    m_part = (lse > float("-inf"))[:, None] & (i_d < D)[None, :]  # no chunk past a row's end was written
    at = (i_c[:, None] * n_rows + row) * D + i_d[None, :]
    part = tl.load(p_part + at, mask=m_part, other=0.0)  # (BC, BD)
    o = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(p_o + row * D + i_d, o.to(p_o.dtype.element_ty), mask=i_d < D)


@cache
def config(rows: int, D: int, fp32: bool, t: Target) -> dict:
    """Blocks of rows, of which there are T G, and of keys: at most a page. Of the stages, half (rounded down)
    are for the load of a page's number, which Triton's pipeliner counts like that of its keys."""
    if fp32:
        BM, BN = 16 if D > 32 or rows <= 16 else 32, 32 if D <= 32 else 16
        return {"BM": BM, "BN": BN, "num_warps": 4, "num_stages": 2}
    stages, roomy = 1 if t.hip else 5, t.shared > 150000
    mma = not t.hip and t.arch not in (90, 100)  # holds keys in registers: 64 at a time spill at D = 128
    if rows <= 16:  # decoding: 32 KB a stage is in flight; in 100 KB two programs share a processor
        stages = 7 if D <= 64 and t.arch >= 90 and roomy else stages if roomy or D <= 64 else min(stages, 3)
        return {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": stages}
    if rows <= 64:
        narrow = mma or (t.arch in (90, 100) and D > 64)  # wider ones spill in groups of 3 and 7
        warps = 8 if mma and D > 64 else 4  # sm_86 spills with 4 at D = 128, sm_120 with 8 at D = 64
        return {"BM": 64, "BN": 32 if narrow else 64, "num_warps": warps, "num_stages": stages}
    return {"BM": 128, "BN": 32 if mma and D > 64 else 64, "num_warps": 8, "num_stages": stages}


def chunks(programs: int, decoding: bool, L: int, t: Target) -> int:
    """Number of chunks of L keys, given the number of programs without chunks; at least 256 keys each.

    Decoding is bound by memory, and 16 programs per processor even out rows of unequal length.
    """
    wanted = (16 if decoding else 2) * t.processors
    return max(1, min(wanted // programs, L // 256, 64))


def cached_attention_triton(q: Tensor, cache: Tensor, place: Place) -> Tensor:
    """The same on a GPU. ValueError if shapes or types disagree, or if head_dim or a page does not suit."""
    (B, T, H, D), (n_kv, P), start, table = q.shape, cache.shape[1:3], place.start, place.pages
    KV, L = n_kv // 2, table.size(1) * P
    fits = cache.size(3) == D and n_kv % 2 == 0 and start.shape == (B,)
    fits = fits and (len(table) == B if table is place.table else len(cache) == B)
    check_fit(fits, q=q, cache=cache, start=start, table=table)
    check(cache.stride()[2:] == (D, 1), "the tokens of a head must be contiguous in the cache")
    check_heads(q, cache, cache, KV)
    rows, BD, t = T * H // KV, next_power_of_2(D), target()
    blocks = config(rows, D, q.dtype == torch.float32, t)
    check(L == P or P % blocks["BN"] == 0, f"pages of {P} tokens: must be a multiple of {blocks['BN']}")
    n_tiles = cdiv(rows, blocks["BM"])
    n_chunks = chunks(B * KV * n_tiles, rows <= 16, L, t)
    chunk = cdiv(cdiv(L, n_chunks), blocks["BN"]) * blocks["BN"]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part, lse = o[None], None  # of a single chunk: the whole
    if n_chunks > 1:
        shape = (n_chunks, B, T, H)
        part, lse = (torch.empty((*shape, n), dtype=torch.float32, device=q.device) for n in (D, 1))
    strides = (*q.stride()[:3], *cache.stride()[:2], table.stride(0), *part.stride()[:4])
    _cached[B * KV, n_chunks, n_tiles](
        q, cache, table, start, place.lens, part, lse, *strides, T, L, chunk, D**-0.5 * LOG2E,
        P=P, KV=KV, G=H // KV, D=D, BD=BD, **blocks,
    )  # fmt: skip
    if n_chunks > 1:
        BC = next_power_of_2(n_chunks)
        _merge[B * T * H,](part, lse, o, n_chunks, B * T * H, D=D, BD=BD, BC=BC)
    return o


cached_attention = choose(cached_attention_torch, cached_attention_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Decoding all seats, rows of unequal length, a single row; an extension by documents; a prefill. Pages
    of 64, in any order."""
    L, H, KV, D, some = m.context, m.heads, m.kv_heads, m.head_dim, min(8, m.seats)
    decode = (m.seats, 1, "decode"), (m.seats, 1, "decode, unequal"), (1, 1, "decode")
    feed = (m.seats, 64 * KV // H, "a few tokens"), (some, L // 8, "extend"), (some, L, "prefill")
    for B, T, name in decode + feed:
        q = torch.randn(B, T, H, D, dtype=m.dtype, device=device)
        pages = B * cdiv(L, 64)
        cache = torch.randn(pages, 2 * KV, 64, D, dtype=m.dtype, device=device)
        table = torch.randperm(pages, dtype=torch.int32, device=device).view(B, -1)
        least = L // 16 if name.endswith("unequal") else L - T
        start = torch.linspace(least, L - T, B, device=device).long()
        place = Place(start, T, table.size(1) * 64, torch.full_like(start, T), dtype=m.dtype, table=table)
        n_keys = (least + L + T) // 2  # the mean row's, after its last token
        work = {"bytes": (2 * B * KV * n_keys + 2 * B * T * H) * D * q.element_size()}
        if T > 1:
            work = {"flops": 4 * B * H * D * T * (L - T + T // 2)}
        name, rivals = f"{name} {B} x {T} at {L}", {"torch, gathered": cached_attention_torch}
        yield measure.versus(name, cached_attention_triton, rivals, q, cache, place, **work)
