"""Sampling by the inverse of the cumulative distribution, from one seeded uniform u per row.

    id = min { v : sum_{w <= v} p_w > u },   p = softmax(z / tau);        logp = log p[id]

The vocabulary is read once and cut into stripes. u selects a stripe by the stripes' masses; where u lies in
that stripe's interval, rescaled to [0, 1), selects the word. The log-prob is returned too, so training needs
no forward pass for the old log-probs. tau = 0 is greedy (ties: the first), with the log-prob of tau = 1.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import cdiv, check, check_fit, choose, next_power_of_2, tl, triton
from .tools import measure

WIDTH = 512  # words in a stripe of the reference


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """mass (B, n), u (B,) in [0, 1), fp64 -> the index (B,) whose interval has u; where in it, in [0, 1)."""
    cdf = mass.cumsum(-1)
    at = (u.clamp(max=1 - 2**-53) * cdf[:, -1])[:, None]
    i = torch.searchsorted(cdf, at, right=True).clamp(max=mass.size(1) - 1)  # (B, 1); beyond for NaN alone
    mine = mass.gather(1, i)
    return i[:, 0], ((at - cdf.gather(1, i) + mine).clamp(min=0) / mine)[:, 0]


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """p (B, V) fp32, u (B,) -> ids (B,). By stripes where V is large: fp64 sums of all words are slow."""
    if p.size(1) <= 2 * WIDTH:
        return _invert(p.double(), u.double())[0]
    stripes = F.pad(p, (0, -p.size(1) % WIDTH)).unflatten(1, (-1, WIDTH))
    stripe, left = _invert(stripes.sum(-1).double(), u.double())
    mine = stripes[torch.arange(len(p), device=p.device), stripe]  # (B, WIDTH)
    ids = stripe * WIDTH + _invert(mine.double(), left)[0]
    return ids.clamp(max=p.size(1) - 1)  # NaN alone may point into the padding


def sample_torch(logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: logits (B, V), u (B,) in [0, 1), temperature (B,) -> ids (B,) int64, logp (B,) fp32."""
    z, greedy = logits.float(), temperature == 0
    tau = torch.where(greedy, 1, temperature)[:, None]
    p = (z if (tau == 1).all() else z / tau).softmax(-1)
    ids = z.argmax(-1) if greedy.any() else None
    if not greedy.all():
        ids = _draw(p, u) if ids is None else torch.where(greedy, ids, _draw(p, u))
    return ids, p.gather(1, ids[:, None])[:, 0].log()


@triton.jit
def _base2(p_temperature):
    """The factor from a row's logits to base-2 exponents: log2(e) / tau, or with tau = 1 if greedy."""
    tau = tl.load(p_temperature).to(tl.float32)
    return 1.4426950408889634 / tl.where(tau == 0, 1.0, tau)


@triton.jit
def _sum_stripe(p_z, p_temperature, p_top, p_first, p_mass, n_words, s_row, n_stripes, STRIPE: tl.constexpr):
    row, stripe = tl.program_id(0), tl.program_id(1)
    i_v = stripe * STRIPE + tl.arange(0, STRIPE)
    z = tl.load(p_z + row.to(tl.int64) * s_row + i_v, i_v < n_words, other=-1e30).to(tl.float32)
    z = tl.maximum(z, -1e30)  # -inf - -inf would be NaN
    top = tl.max(z, 0)
    i_out = row * n_stripes + stripe
    tl.store(p_top + i_out, top)
    tl.store(p_first + i_out, tl.min(tl.where(z == top, i_v, n_words), 0))
    tl.store(p_mass + i_out, tl.sum(tl.exp2((z - top) * _base2(p_temperature + row)), 0))


@triton.jit
def _inverted(mass, i, u):
    """As _invert, for one row. A parallel scan is not quite monotone: words without mass are excluded."""
    cdf = tl.where(mass > 0, tl.cumsum(mass, 0), 0.0)
    at = tl.minimum(u, 1 - 5.9604645e-08) * tl.max(cdf, 0)
    chosen = tl.min(tl.where(cdf > at, i, 2147483647), 0)
    mine = tl.sum(tl.where(i == chosen, mass, 0.0), 0)
    below = tl.sum(tl.where(i == chosen, cdf, 0.0), 0) - mine
    return chosen, tl.maximum(at - below, 0.0) / mine


@triton.jit
def _pick(
    p_z, p_u, p_temperature, p_top, p_first, p_mass, p_ids, p_logp, n_words, s_row, n_stripes,
    STRIPE: tl.constexpr, STRIPES: tl.constexpr,
):  # fmt: skip
    row, i_s = tl.program_id(0), tl.arange(0, STRIPES)
    m, i, scale = i_s < n_stripes, row * n_stripes + i_s, _base2(p_temperature + row)
    tops = tl.load(p_top + i, m, other=-1e30)
    top = tl.max(tops, 0)
    masses = tl.exp2((tops - top) * scale) * tl.load(p_mass + i, m, other=0.0)
    stripe, left = _inverted(masses, i_s, tl.load(p_u + row).to(tl.float32))
    stripe = tl.minimum(stripe, n_stripes - 1)  # logits that are not finite choose none
    p_z += row.to(tl.int64) * s_row
    i_v = stripe * STRIPE + tl.arange(0, STRIPE)
    z = tl.load(p_z + i_v, i_v < n_words, other=-1e30).to(tl.float32)
    chosen, _ = _inverted(tl.exp2((z - top) * scale), i_v, left)
    first = tl.min(tl.where(tops == top, tl.load(p_first + i, m, other=n_words), n_words), 0)
    chosen = tl.minimum(tl.where(tl.load(p_temperature + row) == 0, first, chosen), n_words - 1)
    z = tl.load(p_z + chosen).to(tl.float32)
    tl.store(p_ids + row, chosen.to(tl.int64))
    tl.store(p_logp + row, 0.6931471805599453 * ((z - top) * scale - tl.log2(tl.sum(masses, 0))))


def sample_triton(logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a GPU. ValueError if shapes disagree, or if the words of a row are not contiguous."""
    (B, V), s_row = logits.shape, logits.stride(0)
    check_fit(u.shape == temperature.shape == (B,), logits=logits, u=u, temperature=temperature)
    check(logits.stride(1) == 1, "the words of a row of logits must be contiguous")
    u, tau = u.contiguous(), temperature.contiguous()
    STRIPE = min(4096, next_power_of_2(V))  # 151,936 words: 38 stripes, enough programs for one row
    n = cdiv(V, STRIPE)  # and a short scan in the second step
    top, mass, logp = (logits.new_empty(size, dtype=torch.float32) for size in (B * n, B * n, B))
    first, ids = logits.new_empty(B * n, dtype=torch.int32), logits.new_empty(B, dtype=torch.int64)
    _sum_stripe[(B, n)](logits, tau, top, first, mass, V, s_row, n, STRIPE=STRIPE, num_warps=4)
    c = {"STRIPE": STRIPE, "STRIPES": next_power_of_2(n), "num_warps": 8}
    _pick[(B,)](logits, u, tau, top, first, mass, ids, logp, V, s_row, n, **c)
    return ids, logp


sample = choose(sample_torch, sample_triton)


def _multinomial(z: Tensor, u: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """What most programs do, with torch's random state instead of u."""
    logp = (z.float() / tau[:, None]).log_softmax(-1)
    ids = torch.multinomial(logp.exp(), 1)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """One row, all seats."""
    rivals = {"torch": sample_torch, "multinomial": _multinomial}
    for b in (1, m.seats):
        z = torch.randn(b, m.vocab, dtype=m.dtype, device=device)
        u, tau = torch.rand(b, device=device), torch.ones(b, device=device)
        yield measure.versus(f"{b} x {m.vocab}", sample_triton, rivals, z, u, tau, bytes=z.nbytes)
