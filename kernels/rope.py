"""Rotary position embedding (arXiv 2104.09864) of whole rows, by halves as in Llama and Qwen; for training.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]        x1, x2 = halves of a head

The backward pass rotates back: the same with -sin. Rounding as in Llama: cos and sin (position x frequency)
are cast to the type of x, and so is every product. One program rotates all heads of a token, of q and k,
which may be views of one matrix: only a head's columns must be contiguous. Decoding, which also writes the
cache, is in rope_cache.py.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .launch import check, check_fit, choose, next_power_of_2, tl, triton
from .tools import measure


def signed(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin (..., T, D/2) -> for `rotate` (..., T, 1, D): [cos, cos], [-sin, sin], as dtype."""
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), cos and sin of `signed` -> x rotated: [x1, x2] cos + [x2, x1] sin."""
    return (x * cos).add_(torch.roll(x, x.size(-1) // 2, -1).mul_(sin))


def rope_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: q (B, T, H, D), k (B, T, KV, D) at positions 0..T-1; cos, sin (P, D/2) -> q, k."""
    angles = signed(cos[: q.size(1)], sin[: q.size(1)], q.dtype)
    return rotate(q, *angles), rotate(k, *angles)


@triton.jit
def rotate_heads(
    p_x, s_x, p_y, s_y, cos, sin, on,
    N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a token's N heads, s_x apart from p_x on; store them s_y apart from p_y on, if `on`."""
    i_head, i_col = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    m = (i_head < N) & (i_col < D // 2)  # (HEADS, HALF)
    x1 = tl.load(p_x + i_head * s_x + i_col, mask=m, other=0.0)
    x2 = tl.load(p_x + i_head * s_x + i_col + D // 2, mask=m, other=0.0)
    kind = x1.dtype
    c, s = cos.to(kind).to(tl.float32), sin.to(kind).to(tl.float32)
    a, b = x1.to(tl.float32), x2.to(tl.float32)
    y1 = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
    y2 = (b * c).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)
    tl.store(p_y + i_head * s_y + i_col, y1.to(kind), mask=m & on)
    tl.store(p_y + i_head * s_y + i_col + D // 2, y2.to(kind), mask=m & on)


@triton.jit
def _rope(
    p_q, p_k, p_q_out, p_k_out, p_cos, p_sin,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, n_t,
    SIGN: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_col = tl.arange(0, HALF)[None, :]
    cos = tl.load(p_cos + i_t * (D // 2) + i_col, mask=i_col < D // 2, other=0.0)
    sin = tl.load(p_sin + i_t * (D // 2) + i_col, mask=i_col < D // 2, other=0.0) * SIGN
    q, k, i_token = p_q + i_b * s_qb + i_t * s_qt, p_k + i_b * s_kb + i_t * s_kt, i_b * n_t + i_t
    rotate_heads(q, s_qh, p_q_out + i_token * H * D, D, cos, sin, True, H, D, Q_HEADS, HALF)
    rotate_heads(k, s_kh, p_k_out + i_token * KV * D, D, cos, sin, True, KV, D, K_HEADS, HALF)


@cache
def config(heads: int, kv_heads: int, head_dim: int) -> dict:
    """A token is 1 to 8 thousand elements: with 4 warps, a thread holds at most 64 of them."""
    power = next_power_of_2
    blocks = {"Q_HEADS": power(heads), "K_HEADS": power(kv_heads), "HALF": power(head_dim // 2)}
    return {"H": heads, "KV": kv_heads, "D": head_dim} | blocks | {"num_warps": 4}


def check_table(cos: Tensor, sin: Tensor, D: int) -> None:
    """ValueError unless the tables suit heads of D columns."""
    fits = cos.shape == sin.shape and cos.size(1) == D // 2 and cos.is_contiguous() and sin.is_contiguous()
    check(fits, f"cos {tuple(cos.shape)} and sin must be contiguous and of D / 2 columns for heads of {D}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _launch(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx, dq, dk):
        return *_launch(dq, dk, *ctx.saved_tensors, -1), None, None


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (B, T, H, D), KV = q.shape, k.size(2)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    strides = (*q.stride()[:3], *k.stride()[:3])
    _rope[(T, B)](q, k, q_out, k_out, cos, sin, *strides, T, SIGN=sign, **config(H, KV, D))
    return q_out, k_out


def rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a GPU. ValueError if the shapes do not fit or the table is shorter than the rows."""
    (B, T, _, D), KV = q.shape, k.size(2)
    check_fit(k.shape == (B, T, KV, D), q=q, k=k)
    check_table(cos, sin, D)
    check(cos.size(0) >= T, f"{T} tokens, but a table of {cos.size(0)} positions")
    return _Rope.apply(q, k, cos, sin)


rope = choose(rope_torch, rope_triton)


def inputs(rows: int, n: int, m: measure.Model, device: str) -> tuple[Tensor, ...]:
    """The heads of q, k and v side by side, as the model has them (rows, n, heads, D); cos and sin."""
    qkv = torch.randn(rows, n, m.heads + 2 * m.kv_heads, m.head_dim, dtype=m.dtype, device=device)
    angle = torch.rand(2 * m.context, m.head_dim // 2, device=device) * 6.3
    return qkv, angle.cos(), angle.sin()


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """Training, forward and backward."""
    qkv, cos, sin = inputs(m.batch, m.length, m, device)
    q, k, _ = qkv.split([m.heads, m.kv_heads, m.kv_heads], 2)
    name = f"{m.batch} x {m.length} x ({m.heads} + {m.kv_heads}) x {m.head_dim}"
    for way, back in (("forward", False), ("backward", True)):
        rivals = {"torch": rope_torch} | measure.compiled(rope_torch, device)
        given = q.detach().requires_grad_(back), k.detach().requires_grad_(back), cos, sin
        work = {"gradients": (torch.randn_like(q), torch.randn_like(k)) if back else None}
        work |= {"bytes": 2 * (q.nbytes + k.nbytes)}
        yield measure.versus(f"{way} {name}", rope_triton, rivals, *given, **work)
