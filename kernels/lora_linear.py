"""A frozen linear layer and its adapter (LoRA, arXiv 2106.09685), with hand-written autograd; for training.

    y = x W^T + bias + s (x A^T) B^T
    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

One role per call. The aim is to save memory, not to fuse: cuBLAS does the two thin matmuls, added in place,
without a Triton kernel. x A^T is recomputed in the backward pass, so that a layer keeps only x.
Decoding, with one role per row, is in lora.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, check_fit
from .lora import layers
from .quantised import Matrix, linear, linear_gradient
from .tools import measure


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a (m, n) @ b (n, p), in fp32 where cuBLAS can: for gradients, which are summed over micro-batches, and
    for logits, whose rounding would be most of the gap between old and new log-probs."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale):
        y = linear(x, W, bias)  # (N, o)
        y.addmm_(x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, A, B)
        ctx.W, ctx.scale = W, scale  # frozen
        return y

    @staticmethod
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        dmiddle = dy @ b  # (N, k)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear_gradient(dy, ctx.W).addmm_(dmiddle, a, alpha=ctx.scale)
        dA = mm_fp32(dmiddle.T, x).to(A.dtype).mul_(ctx.scale)
        dB = mm_fp32(dy.T, x @ a.T).to(B.dtype).mul_(ctx.scale)
        return dx, None, None, dA, dB, None


def lora_linear(x: Tensor, W: Matrix, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x (..., i), W (o, i), bias (o,), A (k, i), B (o, k) -> (..., o): a frozen linear layer and its adapter.

    x, W and bias share a type; A and B may be wider (fp32 master copies) and get gradients of their own type.
    Raises ValueError if the shapes disagree or if W or bias require a gradient, which they would not get.
    """
    (o, i), k = W.shape, A.size(0)
    check_fit(x.size(-1) == i and A.shape == (k, i) and B.shape == (o, k), x=x, A=A, B=B)
    frozen = (W, bias) if isinstance(W, Tensor) else (bias,)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in frozen)
    check(not trained, "the base is frozen under an adapter: W and bias must not require gradients")
    y = _LoraLinear.apply(x.flatten(0, -2), W, bias, A, B, float(scale))
    return y.unflatten(0, x.shape[:-1])


def _plain(x, W, bias, A, B, scale):
    return F.linear(x, W) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scale


def _both_ways(f):
    """Forward and backward pass: the gradients of x, A and B from that of y."""
    return lambda x, W, A, B, dy: torch.autograd.grad(f(x, W, None, A, B, 1.0), (x, A, B), dy)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Forward and backward of each of the four layers, over a training batch."""
    n = m.batch * m.length
    for name, i, o, k in layers(m, m.rank):
        x, W, dy = (torch.randn(s, dtype=m.dtype, device=device) for s in ((n, i), (o, i), (n, o)))
        A, B = (torch.randn(s, device=device, requires_grad=True) for s in ((k, i), (o, k)))
        name, given = f"{name} {n}, {i} to {o}, + {k}", (x.requires_grad_(), W, A, B, dy)
        rivals, flops = {"torch": _both_ways(_plain)}, 4 * n * i * o + 6 * n * k * (i + o)
        yield measure.versus(name, _both_ways(lora_linear), rivals, *given, flops=flops)
