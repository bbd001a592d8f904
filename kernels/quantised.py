"""A frozen matrix in 8 or 4 bits, W = diag(scale) M with whole numbers M, and its products.

    y = (x M^T) scale + bias          dx = (dy scale) M          |M| <= 127, scale (d_out,) in fp32

8 bits: M itself. 4 bits: in groups of 32 columns M = m q, with q in -8..7 and a whole number m in -15..15 for
each group: 4.25 bits a number.
Because M is whole in both, it is exact in bf16 and int8, and a matrix of 4 bits runs wherever one of 8 does.

The kernels make M from its bits in registers. Few rows: bound by reading the bits, so the sum over d_in is
split where there are too few blocks for the processors. Many rows: an ordinary tiled product. On a CPU see
digits.py. The adapter's product is added by lora.py and lora_linear.py, as to any linear layer.
"""

from collections.abc import Iterator
from functools import cache, partial
from itertools import product as pairs

import torch
import torch.nn.functional as F
from torch import Tensor

from .digits import can_pack, digit_product, pack
from .launch import Target, cdiv, check, check_fit, choose, next_power_of_2, target, tl, triton
from .lora import layers
from .tools import measure

GROUP = 32  # columns that share m


class Quantised:
    """A matrix (d_out, d_in) in 8 or 4 bits. Its bits are in `q` or, on a CPU that can, in `packed` alone."""

    def __init__(self, q: Tensor | None, m: Tensor | None, scale: Tensor, d_in: int):
        # q: int8 (d_out, d_in) of 8 bits; of 4, uint8 (d_out, d_in / 2): column j low, j + d_in / 2 high
        # m: int8 (d_out, d_in / GROUP), of 4 bits only; scale: (d_out,) fp32
        self.q, self.m, self.scale = q, m, scale
        self.shape = torch.Size((len(scale), d_in))
        self.packed: Tensor | None = None  # M in oneDNN's layout

    @staticmethod
    def empty(d_out: int, d_in: int, bits: int, device: torch.device | str | None = None) -> "Quantised":
        """Room for a matrix. ValueError for 4 bits of a width that is no multiple of 2 GROUP."""
        fits = bits == 8 or d_in % (2 * GROUP) == 0
        check(fits, f"4 bits need widths divisible by {2 * GROUP}, not {d_in}: use 8")
        room = partial(torch.empty, device=device)
        q = room(d_out, d_in * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        m = room(d_out, d_in // GROUP, dtype=torch.int8) if bits == 4 else None
        return Quantised(q, m, room(d_out, dtype=torch.float32), d_in)

    @property
    def nbytes(self) -> int:
        held = self.q, self.m, self.scale
        packed = self.shape.numel() if self.packed is not None else 0
        return packed + sum(x.nbytes for x in held if x is not None)

    def split(self, sizes: list[int]) -> list["Quantised"]:
        """Views of so many rows each."""
        m = [None] * len(sizes) if self.m is None else self.m.split(sizes)
        return [Quantised(*x, self.shape[1]) for x in zip(self.q.split(sizes), m, self.scale.split(sizes))]

    def copy_(self, W: Tensor) -> None:
        """Quantise W into this. Each row's largest number sets its scale; of 4 bits, each group's largest
        becomes -8 m, and m is rounded up or down, whichever is closer to the group."""
        W = W.to(self.scale.device, torch.float32)
        top = W.abs().amax(1, keepdim=True).clamp(min=1e-30)
        if self.m is None:
            self.scale.copy_(top[:, 0] / 127)
            self.q.copy_((W / (top / 127)).round())
            return
        self.scale.copy_(top[:, 0] / 120)
        g = (W / (top / 120)).unflatten(1, (-1, GROUP))  # (d_out, groups, GROUP)
        largest = g.gather(2, g.abs().argmax(2, keepdim=True)) / -8
        up = largest.abs().ceil().clamp(1, 15)
        tried = [m.copysign(largest) for m in (up, (up - 1).clamp(min=1))]
        found = [(g / m).round().clamp(-8, 7) for m in tried]
        far, near = ((q * m - g).square().sum(2, keepdim=True) for q, m in zip(found, tried))
        q, m = (torch.where(far <= near, *pair) for pair in (found, tried))
        low, high = (q.flatten(1) + 8).to(torch.uint8).chunk(2, 1)
        self.q.copy_(low + 16 * high)
        self.m.copy_(m[..., 0])

    def integers(self) -> Tensor:
        """M (d_out, d_in), int8."""
        if self.packed is not None:
            return self.packed.to_dense().T
        if self.m is None:
            return self.q
        q = torch.cat((self.q & 15, self.q >> 4), 1).to(torch.int8) - 8
        return (q.unflatten(1, (-1, GROUP)) * self.m[..., None]).flatten(1)

    def pack(self) -> None:
        """On a CPU with fast products of 8 bits: keep M in their layout, instead of the bits."""
        if self.packed is None and self.scale.device.type == "cpu" and can_pack():
            self.packed, self.q, self.m = pack(self.integers()), None, None


def product_torch(x: Tensor, W: Quantised, bias: Tensor | None = None) -> Tensor:
    """The reference: x (N, d_in), W (d_out, d_in), bias (d_out,) -> (N, d_out)."""
    if W.packed is not None and x.dtype != torch.float64:
        return digit_product(x, W.packed, W.scale, bias)
    wide = torch.promote_types(x.dtype, torch.float32) if x.dtype == torch.float16 else x.dtype  # M is large
    y = F.linear(x.to(wide), W.integers().to(wide)) * W.scale
    return (y if bias is None else y + bias).to(x.dtype)


def gradient_torch(dy: Tensor, W: Quantised) -> Tensor:
    """The reference: dy (N, d_out) -> dx (N, d_in)."""
    wide = torch.float32 if dy.dtype == torch.float16 else dy.dtype  # dy scale is small
    return ((dy * W.scale).to(wide) @ W.integers().to(wide)).to(dy.dtype)


@triton.jit
def _whole(q, p_m, i_o, m_o, first, n_groups, GROUP: tl.constexpr, dtype: tl.constexpr):
    """A block of nibbles, 0 to 15, and the m of its groups, which begin at `first` -> that block of M."""
    n: tl.constexpr = q.shape[1] // GROUP
    i_g = first + tl.arange(0, n)
    m_g = m_o[:, None] & (i_g < n_groups)[None, :]
    m = tl.load(p_m + i_o[:, None] * n_groups + i_g[None, :], m_g, other=0).to(dtype)
    whole = tl.reshape(q.to(tl.int8) - 8, (q.shape[0], n, GROUP)).to(dtype) * m[:, :, None]
    return tl.reshape(whole, q.shape)


@triton.jit
def _product(
    p_x, p_q, p_m, p_scale, p_bias, p_y, n_rows, d_in, d_out, width, span, BITS: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_n, m_o, split = i_n < n_rows, i_o < d_out, tl.program_id(2)
    dtype: tl.constexpr = p_x.dtype.element_ty
    y = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for start in range(0, span, BLOCK_I):
        first = split * span + start
        i_i = first + tl.arange(0, BLOCK_I)
        m_i = i_i < width
        q = tl.load(p_q + i_o[:, None] * width + i_i[None, :], m_o[:, None] & m_i[None, :], other=0)
        at = p_x + i_n.to(tl.int64)[None, :] * d_in + i_i[:, None]
        x = tl.load(at, m_n[None, :] & m_i[:, None], other=0.0)
        if BITS == 8:
            y = tl.dot(q.to(dtype), x, y, input_precision="ieee")
        else:  # the high nibbles are of columns half a row further on
            low = _whole(q & 15, p_m, i_o, m_o, first // GROUP, d_in // GROUP, GROUP, dtype)
            y = tl.dot(low, x, y, input_precision="ieee")
            x = tl.load(at + width, m_n[None, :] & m_i[:, None], other=0.0)
            high = _whole(q >> 4, p_m, i_o, m_o, (width + first) // GROUP, d_in // GROUP, GROUP, dtype)
            y = tl.dot(high, x, y, input_precision="ieee")
    y *= tl.load(p_scale + i_o, m_o, other=0.0)[:, None]
    if SPLITS == 1 and p_bias is not None:
        y += tl.load(p_bias + i_o, m_o, other=0.0).to(tl.float32)[:, None]
    at = p_y + (split * n_rows + i_n).to(tl.int64)[None, :] * d_out + i_o[:, None]
    tl.store(at, y.to(p_y.dtype.element_ty), m_n[None, :] & m_o[:, None])


@triton.jit
def _sum(p_parts, p_bias, p_y, n, d_out, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(p_parts + split * n + i, i < n, other=0.0)
    if p_bias is not None:
        y += tl.load(p_bias + i % d_out).to(tl.float32)
    tl.store(p_y + i, y.to(p_y.dtype.element_ty), i < n)


@triton.jit
def _gradient(
    p_dy, p_q, p_m, p_scale, p_dx, n_rows, d_in, d_out, width, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_n, m_i, half = i_n < n_rows, i_i < width, tl.program_id(2)
    dtype: tl.constexpr = p_dy.dtype.element_ty
    dx = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    for start in range(0, d_out, BLOCK_O):
        i_o = start + tl.arange(0, BLOCK_O)
        m_o = i_o < d_out
        at = p_dy + i_n.to(tl.int64)[:, None] * d_out + i_o[None, :]
        dy = tl.load(at, m_n[:, None] & m_o[None, :], other=0.0)
        dy = (dy * (128 * tl.load(p_scale + i_o, m_o, other=0.0))[None, :]).to(dtype)  # else 0 in fp16
        q = tl.load(p_q + i_o[:, None] * width + i_i[None, :], m_o[:, None] & m_i[None, :], other=0)
        if BITS == 8:
            w = q.to(dtype)
        else:
            first = (half * width + tl.program_id(1) * BLOCK_I) // GROUP
            w = _whole((q >> 4 * half) & 15, p_m, i_o, m_o, first, d_in // GROUP, GROUP, dtype)
        dx = tl.dot(dy, w, dx, input_precision="ieee")
    at = p_dx + i_n.to(tl.int64)[:, None] * d_in + (half * width + i_i)[None, :]
    tl.store(at, (dx / 128).to(dtype), m_n[:, None] & m_i[None, :])


@cache
def config(n: int, o: int, width: int, bits: int, size: int, t: Target) -> tuple[int, dict]:
    """Splits of the sum over d_in, and the blocks of the product: W is read once for up to 64 rows.

    width: bytes of a row of W; size: of a number of x.
    """
    if n > 64:
        narrow = bits == 4 and t.arch < 90  # 128 spill registers there
        big = {"BLOCK_N": 64 if narrow else 128, "BLOCK_O": 128, "BLOCK_I": 128 // size}
        return 1, big | {"num_warps": 8, "num_stages": 2 if t.hip else 3}
    rows = max(16, next_power_of_2(n))
    blocks = cdiv(o, 64)
    splits = next_power_of_2(max(1, min(8, width // 256, 2 * t.processors // blocks)))
    deep, warps = (256, 4) if rows == 16 else (128, 8)
    few = {"BLOCK_N": rows, "BLOCK_O": 64, "BLOCK_I": deep // size, "num_warps": warps}
    return splits, few | {"num_stages": 2 if t.hip else 4}


def _check(x: Tensor, W: Quantised, d: int) -> None:
    check_fit(x.dim() == 2 and x.size(1) == d and x.device == W.scale.device, x=x, scale=W.scale)
    check(W.q is not None, "a packed matrix has no kernel: set KERNELS=torch")
    check(x.dtype != torch.float64, "fp64 has no kernel: set KERNELS=torch")


def product_triton(x: Tensor, W: Quantised, bias: Tensor | None = None) -> Tensor:
    """The same on a GPU. ValueError if shapes disagree, or for fp64."""
    (o, i), n, width = W.shape, len(x), W.q.size(1)
    _check(x, W, i)
    bits = 8 * width // i
    splits, blocks = config(n, o, width, bits, x.element_size(), target())
    y = x.new_empty(n, o)
    parts = y if splits == 1 else x.new_empty(splits, n, o, dtype=torch.float32)
    span = cdiv(cdiv(width, splits), blocks["BLOCK_I"]) * blocks["BLOCK_I"]
    grid = cdiv(n, blocks["BLOCK_N"]), cdiv(o, blocks["BLOCK_O"]), splits
    how = {"BITS": bits, "GROUP": GROUP, "SPLITS": splits} | blocks
    _product[grid](x.contiguous(), W.q, W.m, W.scale, bias, parts, n, i, o, width, span, **how)
    if splits > 1:
        _sum[(cdiv(n * o, 1024),)](parts, bias, y, n * o, o, SPLITS=splits, BLOCK=1024)
    return y


def gradient_triton(dy: Tensor, W: Quantised) -> Tensor:
    """The same on a GPU. ValueError if shapes disagree, or for fp64."""
    (o, i), n, width = W.shape, len(dy), W.q.size(1)
    _check(dy, W, o)
    dx, size, hip = dy.new_empty(n, i), dy.element_size(), target().hip
    blocks = {"BLOCK_N": 128, "BLOCK_O": 128 // size, "BLOCK_I": 128, "num_warps": 8}
    grid = cdiv(n, 128), cdiv(width, 128), i // width
    how = {"BITS": 8 * width // i, "GROUP": GROUP, "num_stages": 2 if hip else 3} | blocks
    _gradient[grid](dy.contiguous(), W.q, W.m, W.scale, dx, n, i, o, width, **how)
    return dx


product = choose(product_torch, product_triton)
gradient = choose(gradient_torch, gradient_triton)


Matrix = Tensor | Quantised  # (d_out, d_in), frozen


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.W = W
        return product(x, W, bias)

    @staticmethod
    def backward(ctx, dy):
        return gradient(dy, ctx.W), None, None


def linear(x: Tensor, W: Matrix, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) -> x W^T + bias, for any frozen W; of a quantised one x alone gets a gradient."""
    if isinstance(W, Tensor):
        return F.linear(x, W, bias)
    f = _Linear.apply if torch.is_grad_enabled() else product
    return f(x.flatten(0, -2), W, bias).unflatten(0, x.shape[:-1])


def linear_gradient(dy: Tensor, W: Matrix) -> Tensor:
    """dy (N, d_out) -> dx (N, d_in) of `linear`."""
    return dy @ W if isinstance(W, Tensor) else gradient(dy, W)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """One row, all seats, a prefill, and back again, through each of the four layers in 8 and 4 bits."""
    for bits, (name, i, o, _) in pairs((8, 4), layers(m, m.rank)):
        W, dense = Quantised.empty(o, i, bits, device), torch.randn(o, i, dtype=m.dtype, device=device)
        W.copy_(dense)
        plain = {"torch": product_torch, "plain": lambda x, W, dense=dense: F.linear(x, dense)}
        back = {"torch": gradient_torch, "plain": lambda dy, W, dense=dense: dy @ dense}
        for n in (1, m.seats, m.batch * m.length):
            x, dy = (torch.randn(n, d, dtype=m.dtype, device=device) for d in (i, o))
            work = {"bytes": W.nbytes + x.nbytes + dy.nbytes} if n <= m.seats else {"flops": 2 * n * i * o}
            yield measure.versus(f"{bits} bits, {name} {n}, {i} to {o}", product_triton, plain, x, W, **work)
        yield measure.versus(f"{bits} bits, {name} back", gradient_triton, back, dy, W, **work)
