"""LoRA (arXiv 2106.09685): one role a row in decoding, one role a call in training.

    y[b] += scale[r] (x[b] A[r]^T) B[r]^T        r = role[b]; role 0 is the reference and adds nothing

Policy and simulator rows sit in the same batch. All rows meet all adapters and the thin middle is masked:
that costs little, has no shape that depends on data, and needs no sorting. On a GPU it is two small launches:
shrink (x A^T for all roles, its long sum split over processors) and expand (add the splits, mask, times B,
onto y). In one, every program would read all of x and A: 1.7 MB for 64 rows of a 3B model's down projection.

Training is a matter of memory, not of fusion: the two thin matmuls are cuBLAS's, added in place, and the
middle x A^T is computed again in the backward pass: a layer keeps only x (all else exists anyway).

    y = x W^T + bias + s (x A^T) B^T
    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Target, check, choose, target, tl, triton


def lora_torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, role: Tensor, scale: Tensor) -> Tensor:
    """The reference: y (B, T, o), x (B, T, i), A (R, k, i), B (R, o, k), role (B,), scale (R,) -> y.

    The adapter of role r is A[r - 1], B[r - 1]. y is updated in place: for decoding, without gradients.
    """
    rows, x = y.flatten(0, 1), x.flatten(0, 1)
    for r in range(len(A)):
        mine = torch.where(role == r + 1, scale[r], 0).repeat_interleave(y.size(1))  # (B T,)
        rows.addmm_((x @ A[r].T).mul_(mine[:, None]), B[r].T)
    return y


@triton.jit
def _shrink_kernel(
    p_x, p_a, p_middle, n, D_IN: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # of all roles' middles, side by side
    m_n, m_c, split = (i_n < n)[:, None], (i_c < C)[None, :], tl.program_id(2)
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, SPAN, BLOCK_I):
        i_i = split * SPAN + start + tl.arange(0, BLOCK_I)
        m_i = i_i < D_IN
        b_x = tl.load(p_x + i_n.to(tl.int64)[:, None] * D_IN + i_i[None, :], m_n & m_i[None, :], other=0.0)
        b_a = tl.load(p_a + i_c[None, :] * D_IN + i_i[:, None], m_c & m_i[:, None], other=0.0)
        acc = tl.dot(b_x, b_a, acc, input_precision="ieee")
    tl.store(p_middle + (split * n + i_n)[:, None].to(tl.int64) * C + i_c[None, :], acc, m_n & m_c)


@triton.jit
def _expand_kernel(
    p_y, p_middle, p_b, p_role, p_scale, n, T, d_out, K: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i_k = tl.arange(0, BLOCK_K)
    m_n, m_o, m_k = i_n < n, i_o < d_out, i_k < K
    b_role = tl.load(p_role + i_n // T, m_n, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for r in range(R):
        mine = (b_role == r + 1)[:, None] & m_k[None, :]
        b_middle = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for split in range(SPLITS):
            at = (split * n + i_n).to(tl.int64)[:, None] * (R * K) + r * K + i_k[None, :]
            b_middle += tl.load(p_middle + at, mine, other=0.0)
        b_middle *= tl.load(p_scale + r).to(tl.float32)
        b_b = tl.load(
            p_b + (r * d_out + i_o)[None, :] * K + i_k[:, None], m_k[:, None] & m_o[None, :], other=0.0
        )
        acc = tl.dot(b_middle.to(b_b.dtype), b_b, acc, input_precision="ieee")
    p_out = p_y + i_n.to(tl.int64)[:, None] * d_out + i_o[None, :]
    m_out = m_n[:, None] & m_o[None, :]
    tl.store(p_out, (tl.load(p_out, m_out, other=0.0).to(tl.float32) + acc).to(p_y.dtype.element_ty), m_out)


def config(n: int, i: int, o: int, columns: int, t: Target) -> dict:
    """Blocks for n rows, and into how many splits the sum over i falls: few rows fill few processors."""
    BLOCK_N = min(64, max(16, triton.next_power_of_2(n)))
    BLOCK_C = min(64, max(16, triton.next_power_of_2(columns)))
    blocks = triton.cdiv(n, BLOCK_N) * triton.cdiv(columns, BLOCK_C)
    splits = max(1, min(8, i // 512, t.processors // 2 // blocks))
    BLOCK_O = min(128, max(32, triton.next_power_of_2(o // 96)))
    BLOCK_I = min(128, max(16, triton.next_power_of_2(i)))
    return dict(BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, BLOCK_I=BLOCK_I, BLOCK_O=BLOCK_O, splits=splits)


def lora_triton(y: Tensor, x: Tensor, A: Tensor, B: Tensor, role: Tensor, scale: Tensor) -> Tensor:
    """As lora_torch; y, x, A and B contiguous and of one type."""
    (b, T, o), (R, k, i) = y.shape, A.shape
    check(
        x.shape == (b, T, i) and B.shape == (R, o, k) and role.shape == (b,) and scale.shape == (R,),
        f"lora: y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, "
        f"role {tuple(role.shape)} and scale {tuple(scale.shape)} do not fit",
    )
    check(y.dtype == x.dtype == A.dtype == B.dtype, "lora: y, x, A and B must have one type")
    check(y.is_contiguous() and A.is_contiguous() and B.is_contiguous(), "lora: y, A, B must be contiguous")
    n, c = b * T, config(b * T, i, o, R * k, target())
    x, role, splits, BLOCK_N = x.contiguous(), role.contiguous(), c["splits"], c["BLOCK_N"]
    span = triton.cdiv(triton.cdiv(i, splits), c["BLOCK_I"]) * c["BLOCK_I"]
    middle = x.new_empty(splits, n, R * k, dtype=torch.float32)
    rows = triton.cdiv(n, BLOCK_N)
    _shrink_kernel[(rows, triton.cdiv(R * k, c["BLOCK_C"]), splits)](
        x, A, middle, n, D_IN=i, C=R * k, SPAN=span,
        BLOCK_N=BLOCK_N, BLOCK_C=c["BLOCK_C"], BLOCK_I=c["BLOCK_I"], num_warps=4, num_stages=3,
    )  # fmt: skip
    _expand_kernel[(rows, triton.cdiv(o, c["BLOCK_O"]))](
        y, middle, B, role, scale, n, T, o, K=k, R=R, SPLITS=splits,
        BLOCK_N=BLOCK_N, BLOCK_K=max(16, triton.next_power_of_2(k)), BLOCK_O=c["BLOCK_O"],
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


lora = choose(lora_torch, lora_triton)


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a (m, n) @ b (n, p), in fp32 where cuBLAS can: the gradients of a step's micro-batches are summed."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale):
        y = F.linear(x, W, bias)  # (N, o)
        y.addmm_(x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, W, A, B)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        dmiddle = dy @ b  # (N, k)
        dx = (dy @ W).addmm_(dmiddle, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        dA = _wide_mm(dmiddle.T, x).to(A.dtype).mul_(ctx.scale)
        dB = _wide_mm(dy.T, x @ a.T).to(B.dtype).mul_(ctx.scale)
        return dx, None, None, dA, dB, None


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x (..., i), W (o, i), bias (o,), A (k, i), B (o, k) -> (..., o): a frozen linear layer and its adapter.

    x, W and bias share a type; A and B may be wider (fp32 master copies) and get gradients of their own type.
    Raises ValueError if the shapes disagree or if the base asks for a gradient, which it would not get.
    """
    (o, i), k = W.shape, A.size(0)
    if x.size(-1) != i or A.shape != (k, i) or B.shape != (o, k):
        raise ValueError(f"x {tuple(x.shape)}, W {(o, i)}, A {tuple(A.shape)}, B {tuple(B.shape)} do not fit")
    if torch.is_grad_enabled() and (W.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the base is frozen under an adapter: W and bias must not require gradients")
    y = _LoraLinear.apply(x.flatten(0, -2), W, bias, A, B, float(scale))
    return y.unflatten(0, x.shape[:-1])
