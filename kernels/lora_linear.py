"""A frozen linear layer and its adapter (LoRA, arXiv 2106.09685), with hand-written autograd; for training.

    y = x W^T + bias + s (x A^T) B^T
    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

One role a call. A matter of memory, not of fusion: the two thin matmuls are cuBLAS's, added in place, so
there is no kernel; and the middle x A^T is computed again in the backward pass: a layer keeps only x (all
else exists anyway). Decoding, with a role a row, is in lora.py.

    python -m kernels.lora_linear        the benchmark
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check
from .lora import layers
from .tools import measure


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
    check(
        x.size(-1) == i and A.shape == (k, i) and B.shape == (o, k),
        f"x {tuple(x.shape)}, W {(o, i)}, A {tuple(A.shape)}, B {tuple(B.shape)} do not fit",
    )
    trained = W.requires_grad or (bias is not None and bias.requires_grad)
    check(
        not (trained and torch.is_grad_enabled()),
        "the base is frozen under an adapter: W and bias must not require gradients",
    )
    y = _LoraLinear.apply(x.flatten(0, -2), W, bias, A, B, float(scale))
    return y.unflatten(0, x.shape[:-1])


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Forward and backward of each of the four layers, over a training batch."""
    for name, i, o, k in layers(m, m.rank):
        yield _case(name, m.batch * m.length, i, o, k, m.dtype, device)


def _case(name: str, n: int, i: int, o: int, k: int, dtype, device) -> measure.Case:
    x, dy = (torch.randn(n, d, dtype=dtype, device=device) for d in (i, o))
    W, A = torch.randn(o, i, dtype=dtype, device=device), torch.randn(k, i, device=device)
    B = torch.randn(o, k, device=device)
    inputs = x.requires_grad_(), A.requires_grad_(), B.requires_grad_()

    def plain(x, W, bias, A, B, scale):
        return F.linear(x, W) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scale

    def both(f):
        return lambda: torch.autograd.grad(f(x, W, None, A, B, 1.0), inputs, dy)

    return measure.Case(
        f"{name} {n}, {i} to {o}, + {k}",
        both(lora_linear),
        {"torch": both(plain)},
        flops=4 * n * i * o + 6 * n * k * (i + o),
    )


if __name__ == "__main__":
    measure.main("lora_linear")
