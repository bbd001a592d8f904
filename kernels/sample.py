"""Sampling: one keyed uniform a row, through the inverse of the cumulative distribution.

    id = min { v : sum_{w <= v} p_w > u },   p = softmax(z / tau);        logp = log p[id]

In two steps, so that the vocabulary is read once: it falls into stripes; u picks one by their masses, and what
is left of u (where in that stripe's interval it fell, again in [0, 1)) picks the word inside. The log-prob
comes with it, so training needs no second forward pass for the old log-probs.
tau = 0 is greedy, the first of equals; its logp is that of tau = 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, choose, tl, triton

WIDTH = 256  # words in a stripe of the reference


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """mass (B, n), u (B,) in [0, 1), fp64 -> the index (B, 1) whose interval holds u; where in it."""
    cdf = mass.cumsum(-1)
    at = u.clamp(max=1 - 2**-53) * cdf[:, -1]
    i = (cdf <= at[:, None]).sum(-1, keepdim=True)
    mine = mass.gather(1, i)[:, 0]
    return i, (at - (cdf.gather(1, i)[:, 0] - mine)).clamp(min=0) / mine


def sample_torch(logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: logits (B, V), u (B,) in [0, 1), temperature (B,) -> ids (B,) int64, logp (B,) fp32."""
    greedy = (temperature == 0)[:, None]
    z = logits.float() / torch.where(greedy, 1, temperature[:, None])
    if z.size(1) % WIDTH:
        z = F.pad(z, (0, -z.size(1) % WIDTH), value=-torch.inf)
    p = z.softmax(-1).unflatten(1, (-1, WIDTH))  # (B, stripes, WIDTH)
    z = z.view_as(p)
    stripe, left = _invert(p.sum(-1).double(), u.double())  # (B, 1), (B,)
    stripe = torch.where(greedy, z.amax(-1).argmax(-1, keepdim=True), stripe)
    here = stripe[:, :, None].expand(-1, 1, WIDTH)
    z, p = z.gather(1, here)[:, 0], p.gather(1, here)[:, 0]  # (B, WIDTH)
    i = torch.where(greedy, z.argmax(-1, keepdim=True), _invert(p.double(), left)[0])
    return (stripe * WIDTH + i)[:, 0], p.gather(1, i)[:, 0].log()


@triton.jit
def _base2(p_temperature):
    """What turns a row's logits into base-2 exponents; a greedy row's log-prob is that of temperature 1."""
    tau = tl.load(p_temperature).to(tl.float32)
    return 1.4426950408889634 / tl.where(tau == 0, 1.0, tau)


@triton.jit
def _stripe_kernel(p_logits, p_temperature, p_top, p_first, p_mass, v, stride, stripes, WIDTH: tl.constexpr):
    row, stripe = tl.program_id(0), tl.program_id(1)
    i_v = stripe * WIDTH + tl.arange(0, WIDTH)
    b_z = tl.load(p_logits + row.to(tl.int64) * stride + i_v, i_v < v, other=-1e30).to(tl.float32)
    b_z = tl.maximum(b_z, -1e30)  # -inf - -inf would be NaN
    top = tl.max(b_z, 0)
    at = row * stripes + stripe
    tl.store(p_top + at, top)
    tl.store(p_first + at, tl.min(tl.where(b_z == top, i_v, v), 0))
    tl.store(p_mass + at, tl.sum(tl.exp2((b_z - top) * _base2(p_temperature + row)), 0))


@triton.jit
def _inverted(mass, i, u):
    """As _invert, for one row. A parallel scan is not quite monotone, so what has no mass is left out."""
    cdf = tl.where(mass > 0, tl.cumsum(mass, 0), 0.0)
    at = tl.minimum(u, 1 - 5.9604645e-08) * tl.max(cdf, 0)
    chosen = tl.min(tl.where(cdf > at, i, 2147483647), 0)
    mine = tl.sum(tl.where(i == chosen, mass, 0.0), 0)
    below = tl.sum(tl.where(i == chosen, cdf, 0.0), 0) - mine
    return chosen, tl.maximum(at - below, 0.0) / mine


@triton.jit
def _pick_kernel(
    p_logits, p_u, p_temperature, p_top, p_first, p_mass, p_ids, p_logp, v, stride, stripes,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, i_s = tl.program_id(0), tl.arange(0, BLOCK_S)
    m_s, at, scale = i_s < stripes, row * stripes + i_s, _base2(p_temperature + row)
    b_top = tl.load(p_top + at, m_s, other=-1e30)
    top = tl.max(b_top, 0)
    b_mass = tl.exp2((b_top - top) * scale) * tl.load(p_mass + at, m_s, other=0.0)
    stripe, left = _inverted(b_mass, i_s, tl.load(p_u + row).to(tl.float32))
    p_row = p_logits + row.to(tl.int64) * stride
    i_v = stripe * WIDTH + tl.arange(0, WIDTH)
    b_z = tl.load(p_row + i_v, i_v < v, other=-1e30).to(tl.float32)
    chosen, _ = _inverted(tl.exp2((b_z - top) * scale), i_v, left)
    first = tl.min(tl.where(b_top == top, tl.load(p_first + at, m_s, other=v), v), 0)
    chosen = tl.where(tl.load(p_temperature + row) == 0, first, chosen)
    z = tl.load(p_row + chosen).to(tl.float32)
    tl.store(p_ids + row, chosen.to(tl.int64))
    tl.store(p_logp + row, 0.6931471805599453 * ((z - top) * scale - tl.log2(tl.sum(b_mass, 0))))


def sample_triton(logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """As sample_torch. Two launches: the stripes of all rows, then a program a row."""
    B, V = logits.shape
    check(
        u.shape == temperature.shape == (B,),
        f"sample: u {tuple(u.shape)} and temperature {tuple(temperature.shape)} must be ({B},)",
    )
    check(logits.stride(1) == 1, "sample: the logits of a row must be contiguous")
    u, temperature = u.contiguous(), temperature.contiguous()
    width = min(4096, triton.next_power_of_2(V))
    stripes = triton.cdiv(V, width)
    top, mass = logits.new_empty(2, B, stripes, dtype=torch.float32)
    first = logits.new_empty(B, stripes, dtype=torch.int32)
    ids, logp = logits.new_empty(B, dtype=torch.int64), logits.new_empty(B, dtype=torch.float32)
    _stripe_kernel[(B, stripes)](
        logits, temperature, top, first, mass, V, logits.stride(0), stripes, WIDTH=width, num_warps=4
    )
    _pick_kernel[(B,)](
        logits, u, temperature, top, first, mass, ids, logp, V, logits.stride(0), stripes,
        WIDTH=width, BLOCK_S=triton.next_power_of_2(stripes), num_warps=8,
    )  # fmt: skip
    return ids, logp


sample = choose(sample_torch, sample_triton)
