"""Causal attention over right-padded rows, for training.

    o[b, t, h] = sum_{s <= t} softmax_s(q[b, t, h] . k[b, s, h / G] / sqrt(D)) v[b, s, h / G]

with G = H / KV query heads per key head. Rows are right-padded, so causality already hides the padding from
every real token; `lengths` only says which outputs are padding (they are zero, and so are their gradients).

Forward: a program handles BM queries of one head. It first visits the keys that all of them see, in whole
blocks without a mask, then those on the diagonal. It saves o and lse (online_softmax.py), from which the
backward pass (attention_backward.py) recomputes the weights. The grid covers every block of every row,
whatever the lengths, so that a launch needs no value from the device; a block of padding loads nothing and
writes zeros. The last blocks of a row see the most keys, so they go first.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_backward import attention_backward
from .launch import Target, cdiv, check, check_fit, choose, next_power_of_2, target, tl, triton
from .online_softmax import LOG2E, attend, load_rows, store_rows
from .tools import measure


def attention_torch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The reference: q (B, T, H, D), k and v (B, T, KV, D), lengths (B,) -> o (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    o = o.transpose(1, 2)
    if lengths is None:
        return o
    real = torch.arange(o.size(1), device=o.device) < lengths[:, None]  # (B, T)
    return o.masked_fill(~real[:, :, None, None], 0)


@triton.jit
def _attention(
    p_q, p_k, p_v, p_o, p_lse, p_lengths,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ob, s_ot, s_oh, T, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (H, B, T / BM): o (B, T, H, D) and lse (B, H, T), base 2, of BM queries. BN divides BM."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = (tl.num_programs(2) - 1 - tl.program_id(2)) * BM  # its first query
    i_t = m + tl.arange(0, BM)
    length = tl.load(p_lengths + b).to(tl.int32)
    m_real = i_t < length
    p_k += b * s_kb + (h // G) * s_kh
    p_v += b * s_vb + (h // G) * s_vh
    q = load_rows(p_q + b * s_qb + h * s_qh, i_t * s_qt, m_real, D, BD, False)  # (BM, BD)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -1e30, tl.float32)
    whole = tl.where(m < length, m, 0)  # on padding both loops are empty
    last = tl.minimum(m + BM, length)
    acc, total, top = attend(acc, total, top, q, i_t, p_k, p_v, s_kt, s_vt, 0, whole, scale, D, BD, BN, False)
    acc, total, top = attend(acc, total, top, q, i_t, p_k, p_v, s_kt, s_vt, m, last, scale, D, BD, BN, True)
    o = tl.where(m_real[:, None], acc / total[:, None], 0.0)
    store_rows(p_o + b * s_ob + h * s_oh, o, i_t * s_ot, i_t < T, D, BD)
    tl.store(p_lse + (b * tl.num_programs(0) + h) * T + i_t, top + tl.log2(total), mask=m_real)


def config(D: int, fp32: bool, t: Target) -> dict:
    """Blocks of queries and keys. Products in fp32 do not run on tensor cores, so blocks are small."""
    if fp32:
        BM, BN = (64 if t.arch != 100 else 32, 32) if D <= 32 else (16, 16)  # sm_100 spills 20 bytes at 64
        return {"BM": BM, "BN": BN, "num_warps": 4, "num_stages": 2}
    if t.hip:
        return {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 1}
    warps = 4 if D <= 64 and t.arch in (90, 100) else 8  # at D = 64 two programs fit on a processor
    return {"BM": 128, "BN": 64, "num_warps": warps, "num_stages": 3}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths):
        B, T, H, D = q.shape
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
        blocks = config(D, q.dtype == torch.float32, target())
        strides = [s for x in (q, k, v, o) for s in x.stride()[:3]]
        _attention[H, B, cdiv(T, blocks["BM"])](
            q, k, v, o, lse, lengths, *strides, T, D**-0.5 * LOG2E,
            G=H // k.size(2), D=D, BD=next_power_of_2(D), **blocks,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, o, lse, lengths)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, lengths = ctx.saved_tensors
        return *attention_backward(q, k, v, o, do, lse, lengths), None


def check_heads(q: Tensor, k: Tensor, v: Tensor, KV: int) -> None:
    """ValueError unless q, k, v have one type, whole groups, and a contiguous head_dim of 16 to 128."""
    (H, D), dtypes = q.shape[2:], {x.dtype for x in (q, k, v)}
    check(H % KV == 0, f"{H} query heads are not a multiple of {KV} key heads")
    known = dtypes <= {torch.bfloat16, torch.float16, torch.float32}
    check(len(dtypes) == 1 and known, f"q, k, v are {dtypes}: all bf16, fp16 or fp32")
    check(16 <= D <= 128 and D % 8 == 0, f"head_dim {D}: must be a multiple of 8 from 16 to 128")
    check(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "head_dim of q, k, v must be contiguous")


def attention_triton(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The same on a GPU. ValueError if shapes or types disagree, or if head_dim does not suit."""
    (B, T, _, D), KV = q.shape, k.size(2)
    lengths = torch.full((B,), T, device=q.device) if lengths is None else lengths
    fits = k.shape == v.shape == (B, T, KV, D) and lengths.shape == (B,)
    check_fit(fits, q=q, k=k, v=v, lengths=lengths)
    check_heads(q, k, v, KV)
    return _Attention.apply(q, k, v, lengths)


attention = choose(attention_torch, attention_triton)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """A rival: SDPA with one backend. It ignores lengths, so it does more work."""
    with sdpa_kernel(backend):
        return attention_torch(q, k, v)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Forward and backward: of full rows, then of rows with a third of padding."""
    B, T, D, KV = m.batch, m.length, m.head_dim, m.kv_heads
    for padded, back in ((False, False), (False, True), (True, False), (True, True)):
        like = {"dtype": m.dtype, "device": device, "requires_grad": back}
        q, k, v = (torch.randn(B, T, heads, D, **like) for heads in (m.heads, KV, KV))
        lengths = torch.linspace(T // 3, T, B, device=device).long() if padded else None  # (B,) mean 2T/3
        pairs = T * T * 13 / 54 if padded else T * T / 2  # of query and key, a row: mean of length^2 / 2
        name = f"{'backward' if back else 'forward'} {B} x {T}{', a third padding' * padded}"
        work = {"flops": int((10 if back else 4) * B * m.heads * D * pairs)}
        work |= {"gradients": torch.randn_like(q) if back else None}
        rivals = {"torch": attention_torch}
        if q.is_cuda and q.dtype != torch.float32:
            rivals |= {"flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION)}
            rivals |= {"cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION)}
        yield measure.versus(name, attention_triton, rivals, q, k, v, lengths, **work)
