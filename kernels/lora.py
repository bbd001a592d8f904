"""LoRA (arXiv 2106.09685): one role a row in decoding, one role a call in training.

    y[b] += scale[r] (x[b] A[r]^T) B[r]^T        r = role[b]; role 0 is the reference and adds nothing

Policy and simulator rows sit in the same batch. The reference multiplies all rows by all adapters and masks the thin
middle, which costs little, has no data-dependent shape, and needs no sorting.

Training is a matter of memory, not of fusion: the two thin matmuls are cuBLAS's, added in place, and the middle x A^T
is computed again in the backward pass, so that x is all that a layer keeps (the base weight and the adapter exist anyway).

    y = x W^T + bias + s (x A^T) B^T
    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, role: Tensor, scale: Tensor) -> Tensor:
    """The reference: y (B, T, o), x (B, T, i), A (R, k, i), B (R, o, k), role (B,), scale (R,) -> y + update.

    The adapter of role r is A[r - 1], B[r - 1].
    """
    R, k, _ = A.shape
    mine = role[:, None] == torch.arange(1, R + 1, device=role.device)  # (B, R)
    mine = mine.to(x.dtype) * scale.to(x.dtype)
    middle = (x @ A.flatten(0, 1).T).unflatten(-1, (R, k)) * mine[:, None, :, None]  # (B, T, R, k)
    return y + middle.flatten(-2) @ B.transpose(1, 2).flatten(0, 1)


lora = lora_torch


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a (m, n) @ b (n, p), in fp32 if a GPU can: a gradient is summed over steps and should not be rounded on the way."""
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
    """x (..., i), W (o, i), bias (o,), A (k, i), B (o, k) -> (..., o): a frozen linear layer with one adapter, trained.

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
