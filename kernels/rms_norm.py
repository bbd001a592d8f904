"""RMSNorm (arXiv 1910.07467), with the residual addition of a pre-norm block fused in.

    s = x + residual        r = 1 / sqrt(mean(s^2) + eps)        y = s r * w

Backward, with g = w dy (the mean is over the row) and ds the gradient that arrives through the sum itself:

    dx = dresidual = ds + r (g - s r mean(g s r))        dw = sum over rows of dy s r

Rounding as in Llama and Qwen: normalise in fp32, cast to the type of x, then scale. Nothing is saved but s
and w: r is computed again, as the row is in registers anyway.

Names in all kernel files: p_ a pointer, s_ a stride in elements, n_ a count, i_ indices, m_ a mask; plain
names for blocks of values; capitals for compile-time constants.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Target, check, choose, target, tl, triton
from .tools import measure


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """The reference: x (..., d), weight (d,) -> y; with a residual (..., d): (y of their sum, the sum)."""
    if residual is not None:
        x = x + residual
    if x.dtype in (torch.bfloat16, torch.float16):  # torch's own rounds once, at the end
        x32 = x.float()
        y = weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    else:
        y = F.rms_norm(x, weight.shape, weight, eps)
    return y if residual is None else (y, x)


@triton.jit
def _norm_forward(
    p_x, p_residual, p_w, p_y, p_sum, n_rows, d, eps, SUM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i_col = tl.arange(0, D)[None, :]
    at, m = i_row * d + i_col, (i_row < n_rows) & (i_col < d)  # (ROWS, D)
    x = tl.load(p_x + at, mask=m, other=0.0)
    if SUM:
        residual = tl.load(p_residual + at, mask=m, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(p_sum + at, x, mask=m)
    s = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 1) / d + eps)[:, None]
    w = tl.load(p_w + i_col, mask=i_col < d, other=0.0)
    y = (s * r).to(x.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(p_y + at, y.to(x.dtype), mask=m)


@triton.jit
def _norm_backward(
    p_dy, p_ds, p_s, p_w, p_dx, n_rows, d, eps, SUM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i_col = tl.arange(0, D)[None, :]
    at, m = i_row * d + i_col, (i_row < n_rows) & (i_col < d)  # (ROWS, D)
    s = tl.load(p_s + at, mask=m, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + at, mask=m, other=0.0).to(tl.float32)
    w = tl.load(p_w + i_col, mask=i_col < d, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 1) / d + eps)[:, None]
    g, n = w * dy, s * r
    dx = r * (g - n * (tl.sum(g * n, 1) / d)[:, None])
    if SUM:
        dx += tl.load(p_ds + at, mask=m, other=0.0).to(tl.float32)
    tl.store(p_dx + at, dx.to(p_dx.dtype.element_ty), mask=m)


def config(d: int, t: Target) -> dict:
    """Short rows share a program, up to 2048 elements; a thread holds 8 to 32 elements of a long one."""
    block = triton.next_power_of_2(d)
    return {"ROWS": max(1, 2048 // block), "D": block, "num_warps": min(16, max(4, block // 512))}


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        d, n_rows = x.size(-1), x.numel() // x.size(-1)
        c = config(d, target())
        y = torch.empty_like(x)
        s = x if residual is None else torch.empty_like(x)
        grid = (triton.cdiv(n_rows, c["ROWS"]),)
        _norm_forward[grid](x, residual, weight, y, s, n_rows, d, eps, SUM=residual is not None, **c)
        ctx.save_for_backward(s, weight)
        ctx.eps, ctx.sum = eps, residual is not None
        ctx.set_materialize_grads(False)
        return (y, s) if ctx.sum else y

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight = ctx.saved_tensors
        if dy is None:
            return ds, None, None, ds
        dy = dy.contiguous()
        ds = None if ds is None else ds.contiguous()
        d, n_rows = s.size(-1), s.numel() // s.size(-1)
        c = config(d, target())
        dx = torch.empty_like(s)
        grid = (triton.cdiv(n_rows, c["ROWS"]),)
        _norm_backward[grid](dy, ds, s, weight, dx, n_rows, d, ctx.eps, SUM=ds is not None, **c)
        dw = _weight_gradient(dy, s, ctx.eps).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, dx if ctx.sum else None


def _weight_gradient(dy: Tensor, s: Tensor, eps: float) -> Tensor:
    """dy and s (..., d) -> (d,). Only where the body itself is trained, which is the toy's: plain torch."""
    s = s.float()
    return (dy * s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)).flatten(0, -2).sum(0)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """The same on a GPU. ValueError if shapes or types disagree, or if a row is longer than 16384."""
    d = x.size(-1)
    check(weight.shape == (d,), f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    check(d <= 16384, f"a row of {d} does not fit the registers of one program: 16384 at most")
    check(x.dtype == weight.dtype, f"x is {x.dtype}, weight {weight.dtype}: must be the same")
    if residual is not None:
        check(residual.shape == x.shape, f"residual {tuple(residual.shape)}, x {tuple(x.shape)}")
        check(residual.dtype == x.dtype, f"residual is {residual.dtype}, x {x.dtype}: must be the same")
        residual = residual.contiguous()
    return _RmsNorm.apply(x.contiguous(), weight.contiguous(), eps, residual)


rms_norm = choose(rms_norm_torch, rms_norm_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Training with the residual, decoding, and a single row; without a residual; the backward pass."""
    rows = m.batch * m.length
    for n, residual in ((rows, True), (m.seats, True), (1, True), (rows, False)):
        yield _forward_case(n, residual, m, device)
    yield _backward_case(rows, m, device)


def _forward_case(n: int, residual: bool, m: measure.Model, device: str) -> measure.Case:
    x, r = (torch.randn(n, m.d, dtype=m.dtype, device=device) for _ in range(2))
    w, r = torch.randn(m.d, dtype=m.dtype, device=device), r if residual else None
    rivals = {"torch": rms_norm_torch} | measure.compiled(rms_norm_torch, device)
    return measure.Case(
        f"forward {n} x {m.d}{' + residual' if residual else ''}",
        lambda: rms_norm_triton(x, w, 1e-6, r),
        {k: lambda f=f: f(x, w, 1e-6, r) for k, f in rivals.items()},
        bytes=(4 if residual else 2) * x.numel() * x.element_size(),
    )


def _backward_case(n: int, m: measure.Model, device: str) -> measure.Case:
    x, r, dy, ds = (torch.randn(n, m.d, dtype=m.dtype, device=device) for _ in range(4))
    w = torch.randn(m.d, dtype=m.dtype, device=device)
    x.requires_grad_(), r.requires_grad_()

    def of(f):
        return measure.backward(lambda: f(x, w, 1e-6, r), (x, r), (dy, ds))

    rivals = {"torch": rms_norm_torch} | measure.compiled(rms_norm_torch, device)
    return measure.Case(
        f"backward {n} x {m.d}",
        of(rms_norm_triton),
        {k: of(f) for k, f in rivals.items()},
        bytes=4 * x.numel() * x.element_size(),
    )


if __name__ == "__main__":
    measure.main("rms_norm")
