"""The backward pass of attention.py, in two kernels; no atomics, so the same bits every time.

With p[t, s] = 2^(x[t, s] - lse[t]), x in base 2 as in online_softmax.py, and do the gradient of o:

    delta[t] = o[t] . do[t]                         ds[t, s] = p[t, s] (do[t] . v[s] - delta[t])
    dq[t] = sum_s ds[t, s] k[s] / sqrt(D)           dk[s] = sum_t ds[t, s] q[t] / sqrt(D)
                                                    dv[s] = sum_t p[t, s] do[t]

dq (and delta): a program handles BM queries of one head and visits the keys as the forward pass does.
dk, dv: a program handles BN keys of one *key* head and loops over the queries from there on, of every query
head in its group, so that the sum over the group stays in registers; where there are few programs, of every
head in a part of it, and the parts are summed afterwards. Scores are transposed there, (BN, BM),
so that keys are the rows of every product. Queries past the length load as zeros (q = do = lse = delta = 0)
and add nothing.
"""

import torch
from torch import Tensor

from .launch import Target, cdiv, next_power_of_2, target, tl, triton
from .online_softmax import LOG2E, load_rows, store_rows


@triton.jit
def _dq_range(
    dq, q, do, lse, delta, i_t, p_k, p_v, s_kt, s_vt, first, last, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys first..last-1 to dq (BM, BD), still without its 1 / sqrt(D). MASKED as in `attend`."""
    i_n = tl.arange(0, BN)
    for n in range(first, last, BN):
        k = load_rows(p_k + n * s_kt, i_n * s_kt, n + i_n < last, D, BD, not MASKED)  # (BN, BD)
        v = load_rows(p_v + n * s_vt, i_n * s_vt, n + i_n < last, D, BD, not MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])  # (BM, BN)
        if MASKED:
            p = tl.where((i_t[:, None] >= n + i_n[None, :]) & (n + i_n < last)[None, :], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_lse, p_delta, p_lengths,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    s_ob, s_ot, s_oh, s_eb, s_et, s_eh, s_gb, s_gt, s_gh, T, scale, root,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (H, B, T / BM): dq (B, T, H, D), delta (B, H, T) of BM queries. BN divides BM; s_e: do, s_g: dq"""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = (tl.num_programs(2) - 1 - tl.program_id(2)) * BM
    i_t = m + tl.arange(0, BM)
    length = tl.load(p_lengths + b).to(tl.int32)
    m_real = i_t < length
    i_lse = (b * tl.num_programs(0) + h) * T + i_t
    p_k += b * s_kb + (h // G) * s_kh
    p_v += b * s_vb + (h // G) * s_vh
    do = load_rows(p_do + b * s_eb + h * s_eh, i_t * s_et, m_real, D, BD, False)  # (BM, BD)
    o = load_rows(p_o + b * s_ob + h * s_oh, i_t * s_ot, m_real, D, BD, False)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (BM,)
    tl.store(p_delta + i_lse, delta, mask=m_real)
    lse = tl.load(p_lse + i_lse, mask=m_real, other=0.0)
    q = load_rows(p_q + b * s_qb + h * s_qh, i_t * s_qt, m_real, D, BD, False)
    whole = tl.where(m < length, m, 0)  # on padding both loops are empty
    last = tl.minimum(m + BM, length)
    dq = tl.zeros((BM, BD), tl.float32)
    dq = _dq_range(dq, q, do, lse, delta, i_t, p_k, p_v, s_kt, s_vt, 0, whole, scale, D, BD, BN, False)
    dq = _dq_range(dq, q, do, lse, delta, i_t, p_k, p_v, s_kt, s_vt, m, last, scale, D, BD, BN, True)
    dq = tl.where(m_real[:, None], dq * root, 0.0)
    store_rows(p_dq + b * s_gb + h * s_gh, dq, i_t * s_gt, i_t < T, D, BD)


@triton.jit
def _dk_dv(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse, p_delta, p_lengths,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_eb, s_et, s_eh, s_gp, s_gb, s_gt, s_gh,
    T, scale, root, G: tl.constexpr, PART: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (KV parts, B, T / BN): dk and dv (parts, B, T, KV, D) of BN keys, from PART query heads of the
    group; PART divides G. BM divides BN. s_e: do, s_g: dk and dv."""
    PARTS: tl.constexpr = G // PART
    kv, part, b = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1).to(tl.int64)
    n = tl.program_id(2) * BN  # its first key; the first blocks have the most queries, and go first
    i_s, i_m = n + tl.arange(0, BN), tl.arange(0, BM)
    length = tl.load(p_lengths + b).to(tl.int32)
    m_key = i_s < length
    k = load_rows(p_k + b * s_kb + kv * s_kh, i_s * s_kt, m_key, D, BD, False)  # (BN, BD)
    v = load_rows(p_v + b * s_vb + kv * s_vh, i_s * s_vt, m_key, D, BD, False)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    p_q += b * s_qb
    p_do += b * s_eb
    n_blocks = tl.cdiv(tl.maximum(length - n, 0), BM)  # of queries, in each head
    first = kv * G + part * PART  # of its heads
    for i in range(PART * n_blocks):
        h = first + i // n_blocks
        m = n + i % n_blocks * BM
        m_real = m + i_m < length
        i_lse = (b * (tl.num_programs(0) // PARTS) * G + h) * T + m + i_m
        q = load_rows(p_q + h * s_qh + m * s_qt, i_m * s_qt, m_real, D, BD, False)  # (BM, BD)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BN, BM)
        lse = tl.load(p_lse + i_lse, mask=m_real, other=0.0)  # (BM,)
        p = tl.exp2(x * scale - lse[None, :])
        if m < n + BN:  # on the diagonal
            p = tl.where(m + i_m[None, :] >= i_s[:, None], p, 0.0)
        do = load_rows(p_do + h * s_eh + m * s_et, i_m * s_et, m_real, D, BD, False)  # (BM, BD)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # (BN, BM)
        delta = tl.load(p_delta + i_lse, mask=m_real, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    at, start = i_s * s_gt, part.to(tl.int64) * s_gp + b * s_gb + kv * s_gh
    store_rows(p_dk + start, tl.where(m_key[:, None], dk * root, 0.0), at, i_s < T, D, BD)
    store_rows(p_dv + start, tl.where(m_key[:, None], dv, 0.0), at, i_s < T, D, BD)


def _config_fp32(D: int) -> dict:
    block = 32 if D <= 32 else 16
    return {"BM": block, "BN": block, "num_warps": 4, "num_stages": 2}


def config_dq(D: int, fp32: bool, t: Target) -> dict:
    """Blocks of queries and keys."""
    if fp32:
        return _config_fp32(D)
    if t.hip:
        return {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 1}
    if t.arch in (90, 100):
        small = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2}  # three programs per processor
        return small if D <= 64 else {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
    return {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 3}


def config_dk_dv(D: int, fp32: bool, t: Target) -> dict:
    """Blocks of queries and keys."""
    if fp32:
        return _config_fp32(D)
    if t.hip:
        return {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 1}
    if D <= 64:
        return {"BM": 64 if t.arch in (90, 100) else 32, "BN": 64, "num_warps": 4, "num_stages": 2}
    return {"BM": 64, "BN": 128 if t.arch in (90, 100) else 64, "num_warps": 8, "num_stages": 2}


def heads_of_a_part(G: int, programs: int, t: Target) -> int:
    """Query heads that one program of `_dk_dv` sums over, if there are so many programs for whole groups.

    The first block of keys meets all queries, the last ones hardly any: the mean of nb blocks is (nb + 1) / 2
    of the longest, so a grid of less than 2 programs a processor lasts as long as its longest program. With
    KV = 2, B = 4, T = 2048 and BN = 128 there are 128, of 16 blocks: 1,088 units of work on 132 processors
    in 16, 52 % used. In halves 256 programs take 8.5, 97 % (each goes to the processor that is free first).
    """
    least = min(G, max(1, 2 * t.processors // programs))  # parts
    return G // next(n for n in range(least, G + 1) if G % n == 0)  # all alike: uneven ones spill at D = 128


def attention_backward(q, k, v, o, do, lse, lengths) -> tuple[Tensor, Tensor, Tensor]:
    """q, o, do (B, T, H, D), k, v (B, T, KV, D), lse (B, H, T) in base 2, lengths (B,) -> dq, dk, dv."""
    (B, T, H, D), KV, root = q.shape, k.size(2), q.size(3) ** -0.5
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta, fp32 = torch.empty_like(lse), q.dtype == torch.float32
    sizes = dict(T=T, scale=root * LOG2E, root=root, G=H // KV, D=D, BD=next_power_of_2(D))
    c = config_dq(D, fp32, target())
    strides = [s for x in (q, k, v, o, do, dq) for s in x.stride()[:3]]
    grid = H, B, cdiv(T, c["BM"])
    _dq[grid](q, k, v, o, do, dq, lse, delta, lengths, *strides, **sizes, **c)
    c = config_dk_dv(D, fp32, target())
    blocks = cdiv(T, c["BN"])
    heads = heads_of_a_part(H // KV, KV * B * blocks, target())
    parts = H // KV // heads
    dk, dv = q.new_empty(2, parts, *k.shape, dtype=q.dtype if parts == 1 else torch.float32)
    strides = [s for x in (q, k, v, do) for s in x.stride()[:3]] + [*dk.stride()[:4]]
    grid = KV * parts, B, blocks
    _dk_dv[grid](q, k, v, do, dk, dv, lse, delta, lengths, *strides, **sizes, PART=heads, **c)
    return dq, *((x[0] if parts == 1 else x.sum(0).to(q.dtype)) for x in (dk, dv))
