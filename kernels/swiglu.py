"""SwiGLU (arXiv 2002.05202), with gate and value as the two halves of one matmul's result.

    y = silu(g) u        [g, u] = halves of x        silu(g) = g sigmoid(g)

Backward, with p = sigmoid(g):

    dg = dy u p (1 + g (1 - p))        du = dy silu(g)

Rounding as in Llama and Qwen: silu in fp32, cast to the type of x, then the product. Only x is saved.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import cdiv, check, choose, next_power_of_2, tl, triton
from .tools import measure


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """The reference: (..., 2f) -> (..., f)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_forward(p_x, p_y, f, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = i < f
    g = tl.load(p_x + i_row * 2 * f + i, mask=m, other=0.0)
    u = tl.load(p_x + i_row * 2 * f + f + i, mask=m, other=0.0)
    silu = (g.to(tl.float32) * tl.sigmoid(g.to(tl.float32))).to(g.dtype)
    y = silu.to(tl.float32) * u.to(tl.float32)
    tl.store(p_y + i_row * f + i, y.to(g.dtype), mask=m)


@triton.jit
def _swiglu_backward(p_x, p_dy, p_dx, f, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = i < f
    g = tl.load(p_x + i_row * 2 * f + i, mask=m, other=0.0).to(tl.float32)
    u = tl.load(p_x + i_row * 2 * f + f + i, mask=m, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + i_row * f + i, mask=m, other=0.0).to(tl.float32)
    p = tl.sigmoid(g)
    dg, du = dy * u * p * (1 + g * (1 - p)), dy * g * p
    tl.store(p_dx + i_row * 2 * f + i, dg.to(p_dx.dtype.element_ty), mask=m)
    tl.store(p_dx + i_row * 2 * f + f + i, du.to(p_dx.dtype.element_ty), mask=m)


def _launch(kernel, x: Tensor, *tensors: Tensor) -> None:
    f = x.size(-1) // 2
    BLOCK = min(1024, next_power_of_2(f))  # 8 elements a thread: one load of 16 bytes in bf16
    kernel[(x.numel() // (2 * f), cdiv(f, BLOCK))](x, *tensors, f, BLOCK=BLOCK, num_warps=4)


def _swiglu(x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.size(-1) // 2)
    _launch(_swiglu_forward, x, y)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _launch(_swiglu_backward, x, dy.contiguous(), dx)
        return dx


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """The same on a GPU. ValueError if the last dimension is odd."""
    check(gate_up.size(-1) % 2 == 0, f"{tuple(gate_up.shape)} does not split into a gate and a value")
    return (_SwiGLU.apply if torch.is_grad_enabled() else _swiglu)(gate_up.contiguous())


swiglu = choose(swiglu_torch, swiglu_triton)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Training, forward and backward, and decoding."""
    tokens = m.batch * m.length
    for n, back in ((tokens, False), (m.seats, False), (1, False), (tokens, True)):
        x = torch.randn(n, 2 * m.ffn, dtype=m.dtype, device=device, requires_grad=back)
        rivals = {"torch": swiglu_torch} | measure.compiled(swiglu_torch, device)
        name, moved = f"{'backward' if back else 'forward'} {n} x {m.ffn}", (5 if back else 3) * x.nbytes // 2
        dy = torch.randn_like(x[:, ::2]) if back else None
        yield measure.versus(name, swiglu_triton, rivals, x, gradients=dy, bytes=moved)
