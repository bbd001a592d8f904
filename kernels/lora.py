"""LoRA (arXiv 2106.09685) in decoding: each row gets a weighted sum of adapters, usually one or none.

    y[b] += sum_r weight[b, r] (x[b] A[r]^T) B[r]

weight[b, r] is the adapter's scale where row b has role r + 1, else 0: policy and simulator share a batch.
Every row is multiplied with the A of all adapters and the thin result is masked: that costs little, no shape
depends on data, and rows need no sorting. On a GPU there are two small launches: shrink (x A^T for all roles,
its long sum split over processors) and expand (sum the splits, weight them, multiply by B, add to y). In one
launch every program would read all of x and A: 2.1 MB for 64 rows of a 3B model's down projection. Training
is in lora_linear.py.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Target, cdiv, check, check_fit, choose, next_power_of_2, target, tl, triton
from .tools import measure


def lora_torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The reference: y (b, T, o), x (b, T, i), A (R, k, i), B (R, k, o), weight (b, R) -> y.

    y is updated in place: for decoding, without gradients.
    """
    middle = x.flatten(0, 1) @ A.flatten(0, 1).T  # (b T, R k): of all roles, side by side
    middle.view(len(x), -1, *A.shape[:2]).mul_(weight[:, None, :, None])
    y.flatten(0, 1).addmm_(middle, B.flatten(0, 1))
    return y


@triton.jit
def _shrink(
    p_x, p_a, p_middle, n_rows, d_in, n_columns, span,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # of all roles' middles, side by side
    m_n, m_c, split = (i_n < n_rows)[:, None], (i_c < n_columns)[None, :], tl.program_id(2)
    middle = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, span, BLOCK_I):
        i_i = split * span + start + tl.arange(0, BLOCK_I)
        m_i = i_i < d_in
        x = tl.load(p_x + i_n.to(tl.int64)[:, None] * d_in + i_i[None, :], m_n & m_i[None, :], other=0.0)
        a = tl.load(p_a + i_c[None, :] * d_in + i_i[:, None], m_c & m_i[:, None], other=0.0)
        middle = tl.dot(x, a, middle, input_precision="ieee")
    i_out = (split * n_rows + i_n).to(tl.int64)[:, None] * n_columns + i_c[None, :]
    tl.store(p_middle + i_out, middle, m_n & m_c)


@triton.jit
def _expand(
    p_y, p_middle, p_b, p_weight, n_rows, T, d_out, k, R: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_n, m_o = i_n < n_rows, i_o < d_out
    dy = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for r in tl.static_range(R):
        weight = tl.load(p_weight + i_n // T * R + r, m_n, other=0.0).to(tl.float32)
        mine = (weight != 0)[:, None]
        for start in range(0, k, BLOCK_K):
            i_k = start + tl.arange(0, BLOCK_K)
            m_k = i_k < k
            i = (i_n * (R * k) + r * k)[:, None] + i_k[None, :]
            middle = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for split in tl.static_range(SPLITS):
                middle += tl.load(p_middle + split * n_rows * (R * k) + i, mine & m_k[None, :], other=0.0)
            i = (r * k + i_k)[:, None] * d_out + i_o[None, :]
            b = tl.load(p_b + i, m_k[:, None] & m_o[None, :], other=0.0)
            dy = tl.dot((middle * weight[:, None]).to(b.dtype), b, dy, input_precision="ieee")
    i, m = i_n.to(tl.int64)[:, None] * d_out + i_o[None, :], m_n[:, None] & m_o[None, :]
    y = tl.load(p_y + i, m, other=0.0).to(tl.float32) + dy
    tl.store(p_y + i, y.to(p_y.dtype.element_ty), m)


def _block(n: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(n)))


@cache
def config(n: int, i: int, o: int, R: int, k: int, bits: int, t: Target) -> tuple[dict, dict]:
    """For shrink and expand. The sum over i is split because few rows alone would leave processors idle.

    Blocks are powers of two, other sizes run-time arguments: few compiled kernels serve every layer.
    """
    rows, columns = {"BLOCK_N": _block(n, 64)}, {"BLOCK_C": _block(R * k, 64)}
    blocks = cdiv(n, rows["BLOCK_N"]) * cdiv(R * k, columns["BLOCK_C"])
    splits = next_power_of_2(max(1, min(8, i // 512, t.processors // 2 // blocks)))
    depth = {"BLOCK_I": _block(i, 1024 // bits), "num_warps": 4, "num_stages": 2 if t.hip else 4}
    expand = {"SPLITS": splits, "BLOCK_K": _block(k, 64), "BLOCK_O": _block(o, 1024 // bits), "num_warps": 8}
    return rows | columns | depth, rows | expand | {"num_stages": 1}  # 2 stages spill registers


def lora_triton(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The same on a GPU. ValueError if shapes or types disagree, or if y, A or B is not contiguous."""
    (b, T, o), (R, k, i) = y.shape, A.shape
    fits = x.shape == (b, T, i) and B.shape == (R, k, o) and weight.shape == (b, R)
    check_fit(fits and y.dtype == x.dtype == A.dtype == B.dtype, y=y, x=x, A=A, B=B, weight=weight)
    check(y.is_contiguous() and A.is_contiguous() and B.is_contiguous(), "y, A and B must be contiguous")
    n, C = b * T, R * k
    shrink, expand = config(n, i, o, R, k, 8 * x.element_size(), target())
    splits, rows = expand["SPLITS"], cdiv(n, shrink["BLOCK_N"])
    span = cdiv(cdiv(i, splits), shrink["BLOCK_I"]) * shrink["BLOCK_I"]
    middle = x.new_empty(splits, n, C, dtype=torch.float32)
    grid = rows, cdiv(C, shrink["BLOCK_C"]), splits
    _shrink[grid](x.contiguous(), A, middle, n, i, C, span, **shrink)
    grid = rows, cdiv(o, expand["BLOCK_O"])
    _expand[grid](y, middle, B, weight.contiguous(), n, T, o, k, R=R, **expand)
    return y


lora = choose(lora_torch, lora_triton)


def layers(m: measure.Model, rank: int) -> Iterator[tuple[str, int, int, int]]:
    """The four fused linear layers: name, inputs, outputs, rank of all their adapters together."""
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    yield "qkv", m.d, q + 2 * kv, 3 * rank
    yield "out", q, m.d, rank
    yield "gate_up", m.d, 2 * m.ffn, 2 * rank
    yield "down", m.ffn, m.d, rank


def _with_base(f):
    return lambda x, W, *adapters: f(F.linear(x, W), x, *adapters)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """One row, all seats, and a prefill of 128 tokens per seat, through each of the four layers."""
    rivals = {"torch": _with_base(lora_torch), "base alone": lambda x, W, *adapters: F.linear(x, W)}
    sizes = ((1, 1), (m.seats, 1), (m.seats, 128 if m.seats > 3 else 3))
    layer = (one for rank in (m.rank, 4 * m.rank) for one in layers(m, rank))
    for (name, i, o, k), (b, T) in product(layer, sizes):
        shapes = (b, T, i), (o, i), (2, k, i), (2, k, o)
        given = [torch.randn(shape, dtype=m.dtype, device=device) for shape in shapes]
        weight = torch.eye(2, device=device)[torch.arange(b, device=device) % 2]  # (b, 2)
        moved = sum(x.nbytes for x in given) + b * T * o * m.dtype.itemsize
        name = f"{name} {b} x {T}, {i} to {o}, + {k}"
        yield measure.versus(name, _with_base(lora_triton), rivals, *given, weight, bytes=moved)
