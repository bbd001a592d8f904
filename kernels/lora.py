"""LoRA (arXiv 2106.09685) in decoding: each row gets a weighted sum of adapters, usually one or none.

    y[b] += sum_r weight[b, r] (x[b] A[r]^T) B[r]

weight[b, r] is the adapter's scale where row b has role r + 1, else 0: policy and simulator share a batch.
Every row is multiplied with the A of all adapters and the thin result is masked: that costs little, no shape
depends on data, and rows need no sorting. In one launch every program would read all of x and A: 2.1 MB for
64 rows of a 3B model's down projection. So on a GPU there are two:
- A of all roles lies below W, as further rows of one matrix, so that the base's own product gives x A^T too;
  `expand` weights that, multiplies it by B and adds it to y. One small launch beside the product.
- Below a quantised W there is no room for A. `lora`: shrink (x A^T, its long sum split over processors), then
  expand, which also sums the splits.
Training is in lora_linear.py.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import FORCED, Target, cdiv, check, check_fit, choose, next_power_of_2, target, tl, triton
from .tools import measure


def joins(x: Tensor) -> bool:
    """Whether A lies below W on x's device: where kernels are used. A CPU has layouts of its own for W."""
    return x.device.type != "cpu" or FORCED == "triton"


def below(rows: int) -> int:
    """Rows below W for so many of A: a multiple of 16, else the product is not stored in whole vectors."""
    return cdiv(rows, 16) * 16


def lora_torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The reference: y (b, T, o), x (b, T, i), A (R, k, i), B (R, k, o), weight (b, R) -> y.

    y is updated in place: for decoding, without gradients.
    """
    middle = x.flatten(0, 1) @ A.flatten(0, 1).T  # (b T, R k): of all roles, side by side
    middle.view(len(x), -1, *A.shape[:2]).mul_(weight[:, None, :, None])
    y.flatten(0, 1).addmm_(middle, B.flatten(0, 1))
    return y


def expand_torch(z: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The reference: z (b, T, o + `below`(R k)), x times W and the A below it -> y (b, T, o)."""
    R, k, o = B.shape
    middle = z[..., o : o + R * k].unflatten(2, (R, k)) * weight[:, None, :, None]
    return z[..., :o] + middle.flatten(2).to(z.dtype) @ B.flatten(0, 1)


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
    p_base, p_middle, p_b, p_weight, p_y, s_base, s_middle, n_rows, T, d_out, k, R: tl.constexpr,
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
            i = (i_n.to(tl.int64) * s_middle + r * k)[:, None] + i_k[None, :]
            middle = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for split in tl.static_range(SPLITS):
                middle += tl.load(p_middle + split * n_rows * s_middle + i, mine & m_k[None, :], other=0.0)
            i = (r * k + i_k)[:, None] * d_out + i_o[None, :]
            b = tl.load(p_b + i, m_k[:, None] & m_o[None, :], other=0.0)
            dy = tl.dot((middle * weight[:, None]).to(b.dtype), b, dy, input_precision="ieee")
    i_n, m = i_n.to(tl.int64)[:, None], m_n[:, None] & m_o[None, :]
    y = tl.load(p_base + i_n * s_base + i_o[None, :], m, other=0.0).to(tl.float32) + dy
    tl.store(p_y + i_n * d_out + i_o[None, :], y.to(p_y.dtype.element_ty), m)


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
    _expand[grid](y, middle, B, weight.contiguous(), y, o, C, n, T, o, k, R=R, **expand)
    return y


def expand_triton(z: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The same on a GPU. ValueError if shapes or types disagree, or if z or B is not contiguous."""
    (b, T, S), (R, k, o) = z.shape, B.shape
    fits = o + below(R * k) == S and weight.shape == (b, R) and z.dtype == B.dtype
    check_fit(fits, z=z, B=B, weight=weight)
    check(z.is_contiguous() and B.is_contiguous(), "z and B must be contiguous")
    n, y = b * T, z.new_empty(b, T, o)
    _, blocks = config(n, 0, o, R, k, 8 * z.element_size(), target())  # no sum is left to split
    grid = cdiv(n, blocks["BLOCK_N"]), cdiv(o, blocks["BLOCK_O"])
    _expand[grid](z, z[..., o:], B, weight.contiguous(), y, S, S, n, T, o, k, R=R, **blocks)
    return y


lora = choose(lora_torch, lora_triton)
expand = choose(expand_torch, expand_triton)


def layers(m: measure.Model, rank: int) -> Iterator[tuple[str, int, int, int]]:
    """The four fused linear layers: name, inputs, outputs, rank of all their adapters together."""
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    yield "qkv", m.d, q + 2 * kv, 3 * rank
    yield "out", q, m.d, rank
    yield "gate_up", m.d, 2 * m.ffn, 2 * rank
    yield "down", m.ffn, m.d, rank


def _apart(f):
    return lambda x, WA, A, B, weight: f(F.linear(x, WA[: B.size(2)]), x, A, B, weight)


def _joined(f):
    return lambda x, WA, A, B, weight: f(F.linear(x, WA), B, weight)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """One row, all seats, a prefill of 128 tokens a seat, in each layer: A below W, and apart from it."""
    rivals = {"torch": _joined(expand_torch), "apart": _apart(lora_triton)}
    rivals |= {"base alone": lambda x, WA, A, B, weight: F.linear(x, WA[: B.size(2)])}
    sizes = ((1, 1), (m.seats, 1), (m.seats, 128 if m.seats > 3 else 3))
    layer = (one for rank in (m.rank, 4 * m.rank) for one in layers(m, rank))
    for (name, i, o, k), (b, T) in product(layer, sizes):
        shapes = (b, T, i), (o + below(2 * k), i), (2, k, o)
        x, WA, B = (torch.randn(shape, dtype=m.dtype, device=device) for shape in shapes)
        weight = torch.eye(2, device=device)[torch.arange(b, device=device) % 2]  # (b, 2)
        given = x, WA, WA[o : o + 2 * k].view(2, k, i), B, weight
        moved = x.nbytes + WA.nbytes + B.nbytes + b * T * o * m.dtype.itemsize
        name = f"{name} {b} x {T}, {i} to {o}, + {k}"
        yield measure.versus(f"joined, {name}", _joined(expand_triton), rivals, *given, bytes=moved)
        plain = {"torch": _apart(lora_torch)}
        yield measure.versus(f"apart, {name}", _apart(lora_triton), plain, *given, bytes=moved)
