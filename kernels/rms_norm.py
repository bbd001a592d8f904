"""RMSNorm (arXiv 1910.07467), with the residual addition of a pre-norm block fused in.

    s = x + residual        r = 1 / sqrt(mean(s^2) + eps)        y = s r * w

Backward, with g = w dy (the mean is over the row) and ds the gradient that arrives through the sum itself:

    dx = dresidual = ds + r (g - s r mean(g s r))        dw = sum over rows of dy s r

Rounding as in Llama and Qwen: normalise in fp32, cast to the type of x, then scale. Only s and w are saved: r
is recomputed, because the row is in registers anyway.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import cdiv, check, check_fit, choose, next_power_of_2, tl, triton
from .tools import measure


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """The reference: x (..., d), weight (d,) -> y; with a residual (..., d): (y of their sum, the sum)."""
    if residual is not None:
        x = x + residual
    if x.dtype in (torch.bfloat16, torch.float16):  # F.rms_norm rounds once, at the end
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


def _launch(kernel, *tensors: Tensor | None, eps: float, SUM: bool) -> None:
    """Short rows share a program, up to 2048 elements; a thread holds 8 to 32 elements of a long one."""
    d, n_rows = tensors[0].size(-1), tensors[0].numel() // tensors[0].size(-1)
    D = next_power_of_2(d)
    c = {"ROWS": max(1, 2048 // D), "D": D, "num_warps": min(16, max(4, D // 512))}
    kernel[(cdiv(n_rows, c["ROWS"]),)](*tensors, n_rows, d, eps, SUM=SUM, **c)


def _norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm, and the sum that it is of."""
    y = torch.empty_like(x)
    s = x if residual is None else torch.empty_like(x)
    _launch(_norm_forward, x, residual, weight, y, s, eps=eps, SUM=residual is not None)
    return y, s


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.eps, ctx.sum = eps, residual is not None
        y, s = _norm(x, weight, eps, residual)
        ctx.save_for_backward(s, weight)
        ctx.set_materialize_grads(False)
        return (y, s) if ctx.sum else y

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight = ctx.saved_tensors
        if dy is None:
            return ds, None, None, ds
        dy, ds, dx = dy.contiguous(), None if ds is None else ds.contiguous(), torch.empty_like(s)
        _launch(_norm_backward, dy, ds, s, weight, dx, eps=ctx.eps, SUM=ds is not None)
        dw = None
        if ctx.needs_input_grad[1]:  # only when the body itself is trained (toy/make.py): plain torch
            r = torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + ctx.eps)
            dw = (dy * s.float() * r).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dw, None, dx if ctx.sum else None


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """The same on a GPU. ValueError if shapes or types disagree, or if a row is longer than 16384."""
    d, r = x.size(-1), x if residual is None else residual
    fits = weight.shape == (d,) and r.shape == x.shape and x.dtype == weight.dtype == r.dtype
    check_fit(fits, x=x, weight=weight, residual=residual)
    check(d <= 16384, f"a row of {d} does not fit the registers of one program: 16384 at most")
    residual = None if residual is None else residual.contiguous()
    given = x.contiguous(), weight.contiguous(), eps, residual
    if torch.is_grad_enabled():
        return _RmsNorm.apply(*given)
    y, s = _norm(*given)
    return y if residual is None else (y, s)


rms_norm = choose(rms_norm_torch, rms_norm_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Training with the residual, decoding, and a single row; without a residual; the backward pass."""
    tokens = m.batch * m.length
    forward = (tokens, True, False), (m.seats, True, False), (1, True, False), (tokens, False, False)
    for n, both, back in (*forward, (tokens, True, True)):
        x, r, dy, ds = (torch.randn(n, m.d, dtype=m.dtype, device=device) for _ in range(4))
        given = x.requires_grad_(back), torch.randn_like(x[0]), 1e-6, r.requires_grad_(back) if both else None
        name = f"{'backward' if back else 'forward'} {n} x {m.d}{' + residual' * (both and not back)}"
        rivals = {"torch": rms_norm_torch} | measure.compiled(rms_norm_torch, device)
        work = {"gradients": (dy, ds) if back else None, "bytes": (4 if both else 2) * x.nbytes}
        yield measure.versus(name, rms_norm_triton, rivals, *given, **work)
