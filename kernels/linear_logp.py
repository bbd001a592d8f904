"""Log-probability of given tokens from hidden states and a frozen head, without ever holding the logits.

    z = h W^T / tau        logp = z[target] - lse(z)        H = lse(z) - sum_v p_v z_v        p = softmax(z)

N = 16,384 tokens times V = 151,936 words is 10 GB in fp32. The head is frozen, so nothing of that size is
needed. Forward: the vocabulary is cut into stripes; a stripe stores, for each row, its maximum m,
s = sum e^(z - m) and t = sum e^(z - m) (z - m). The stripes of a row are merged:

    m' = max m        s' = sum e^(m - m') s        t' = sum e^(m - m') (t + (m - m') s)
    lse = m' + log s'        H = log s' - t' / s'

Backward (linear_logp_backward.py): for some hundreds of tokens at a time, z again, its gradient dz, and then
dh = dz W / tau by cuBLAS. The reference works tile by tile both ways, in fp32 even for bf16 and fp16: logits
rounded to bf16 make p wrong by a percent. The kernels use base 2 (z log2 e): exp2 is one instruction.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import cdiv, check, check_fit, choose, next_power_of_2, target, tl, triton
from .linear_logp_backward import gradient_torch, gradient_triton
from .logits_tile import at_least_fp32, chunks, config, first_row_and_word, logits_tile, tiles, within
from .tools import measure

STRIPED = 2048  # tokens per launch: their stripes' m, s and t take up to 58 MB at V = 151,936
Pair = tuple[Tensor, Tensor]


def _statistics_torch(h: Tensor, W: Tensor, targets: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """h (N, d), W (V, d), targets (N,) -> log-probs, entropies and log-sum-exps (N,), in fp32 or fp64."""
    s, t, z_at, top = at_least_fp32(h[:, 0]).new_zeros(4, len(h))
    top -= 1e30
    for n, v, _, z in tiles(h, W, tau):
        mine, at = within(targets[n], v)
        z_at[n] = torch.where(mine, z.gather(1, at[:, None])[:, 0], z_at[n])
        higher = torch.maximum(top[n], z.amax(-1))
        e = z.sub_(higher[:, None]).exp()
        gap = top[n] - higher
        t[n] = gap.exp() * (t[n] + gap * s[n]) + torch.linalg.vecdot(e, z)
        s[n] = gap.exp() * s[n] + e.sum(-1)
        top[n] = higher
    return z_at - top - s.log(), s.log() - t / s, top + s.log()


class _LinearLogp(torch.autograd.Function):
    """Reference and kernels differ in `statistics` and `gradient` alone."""

    @staticmethod
    def forward(ctx, h, W, targets, tau, statistics, gradient):
        logp, entropy, lse = statistics(h, W, targets, tau)
        ctx.save_for_backward(h, W, targets, lse, entropy)
        ctx.tau, ctx.gradient = tau, gradient
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        h, W, targets, lse, entropy = ctx.saved_tensors
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        dh = ctx.gradient(h, W, targets, ctx.tau, lse, entropy, dlogp, dentropy)
        return dh.to(h.dtype), None, None, None, None, None


def linear_logp_torch(h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0) -> Pair:
    """The reference: h (N, d), W (V, d), targets (N,) -> log-probs and entropies (N,) in nats, fp32 or fp64.
    Only h gets a gradient: the head is frozen."""
    return _LinearLogp.apply(h, W, targets, temperature, _statistics_torch, gradient_torch)


@triton.jit
def _reduce(z, stripe, at, i_n, p_top, p_sum, p_dev, p_z_at, n_rows, n_words, n_stripes, WIDTH: tl.constexpr):
    """A stripe's logits z (rows, WIDTH) -> its m, s and t, and the logits of the targets `at` within it."""
    i_v, m_n = stripe * WIDTH + tl.arange(0, WIDTH), i_n < n_rows
    z_at = tl.sum(tl.where(i_v[None, :] == at[:, None], z, 0.0), 1)
    tl.store(p_z_at + i_n, z_at, m_n & (at // WIDTH == stripe))
    z = tl.where(i_v[None, :] < n_words, z, -1e30)
    top = tl.max(z, 1)
    z -= top[:, None]
    e = tl.exp2(z)
    i_out = i_n.to(tl.int64) * n_stripes + stripe
    tl.store(p_top + i_out, top, m_n)
    tl.store(p_sum + i_out, tl.sum(e, 1), m_n)
    tl.store(p_dev + i_out, tl.sum(e * z, 1), m_n)


@triton.jit
def _stripe(
    p_h, p_w, p_targets, p_top, p_sum, p_dev, p_z_at, scale, n_rows, n_words, n_stripes, d,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_V // 2
    n, v = first_row_and_word(n_rows, BLOCK_N, BLOCK_V)
    i_n, stripe = n + tl.arange(0, BLOCK_N), v // WIDTH
    z = logits_tile(p_h, p_w, n, v, n_rows, n_words, d, WHOLE, BLOCK_N, BLOCK_V, BLOCK_D) * scale
    at = tl.load(p_targets + i_n, i_n < n_rows, other=-1).to(tl.int32)
    # Two stripes, one after the other: with the exponentials of both alive, sm_90 spills 72 bytes.
    z_0, z_1 = tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, WIDTH)), (0, 2, 1)))
    _reduce(z_0, stripe, at, i_n, p_top, p_sum, p_dev, p_z_at, n_rows, n_words, n_stripes, WIDTH)
    _reduce(z_1, stripe + 1, at, i_n, p_top, p_sum, p_dev, p_z_at, n_rows, n_words, n_stripes, WIDTH)


@triton.jit
def _merge_stripes(p_top, p_sum, p_dev, p_z_at, p_logp, p_entropy, p_lse, n_stripes, BLOCK_S: tl.constexpr):
    LN2: tl.constexpr = 0.6931471805599453
    row, i_s = tl.program_id(0), tl.arange(0, BLOCK_S)
    m, i = i_s < n_stripes, row * n_stripes + i_s
    tops = tl.load(p_top + i, m, other=-1e30)
    sums, devs = tl.load(p_sum + i, m, other=0.0), tl.load(p_dev + i, m, other=0.0)
    top = tl.max(tops, 0)
    gap = tops - top
    s = tl.sum(tl.exp2(gap) * sums, 0)
    t = tl.sum(tl.exp2(gap) * (devs + gap * sums), 0)
    tl.store(p_logp + row, LN2 * ((tl.load(p_z_at + row) - top) - tl.log2(s)))
    tl.store(p_entropy + row, LN2 * (tl.log2(s) - t / s))
    tl.store(p_lse + row, top + tl.log2(s))


def _statistics_triton(h: Tensor, W: Tensor, targets: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """As _statistics_torch, but the log-sum-exps are in base 2."""
    (N, d), V, c = h.shape, len(W), config(h.dtype, h.size(1), target())
    logp, entropy, lse, z_at = h.new_empty(4, N, dtype=torch.float32)
    S, scale = 2 * cdiv(V, c["BLOCK_V"]), math.log2(math.e) / tau  # S stripes, two per program
    BLOCK_S, stripes = next_power_of_2(S), h.new_empty(3, min(N, STRIPED), S, dtype=torch.float32)
    for n in chunks(N, STRIPED):
        rows, partial = n.stop - n.start, (*stripes, z_at[n])
        grid = (cdiv(rows, c["BLOCK_N"]) * S // 2,)
        _stripe[grid](h[n], W, targets[n], *partial, scale, rows, V, S, d, **c)
        _merge_stripes[(rows,)](*partial, logp[n], entropy[n], lse[n], S, BLOCK_S=BLOCK_S)
    return logp, entropy, lse


def linear_logp_triton(h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0) -> Pair:
    """The same on a GPU. ValueError if shapes or types disagree, or for fp64."""
    fits = h.dim() == W.dim() == 2 and h.size(1) == W.size(1) and targets.shape == h.shape[:1]
    check_fit(fits and h.dtype == W.dtype, h=h, W=W, targets=targets)
    check(h.dtype != torch.float64, "fp64 has no kernel: set KERNELS=torch")
    check(W.is_contiguous(), "W must be contiguous: it is too large to copy")
    h, targets = h.contiguous(), targets.contiguous()
    return _LinearLogp.apply(h, W, targets, temperature, _statistics_triton, gradient_triton)


linear_logp = choose(linear_logp_torch, linear_logp_triton)


def _logits_at_once(h: Tensor, W: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What most programs do: all logits, cuBLAS and log_softmax."""
    logp = torch.log_softmax(h @ W.T, -1, dtype=torch.float32)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """The tokens of a training batch, forward; backward with and without the entropy."""
    N = m.batch * m.length
    h = torch.randn(N, m.d, dtype=m.dtype, device=device)
    W = torch.randn(m.vocab, m.d, dtype=m.dtype, device=device) / m.d**0.5
    targets, dlogp = torch.randint(m.vocab, (N,), device=device), torch.randn(N, device=device)
    shape, flops = f"{N} x {m.vocab}", 2 * N * m.vocab * m.d
    rivals = {"torch": linear_logp_torch, "logits": _logits_at_once}
    more = {"matmul": lambda h, W, targets: h @ W.T}
    yield measure.versus(f"forward {shape}", linear_logp_triton, rivals | more, h, W, targets, flops=flops)
    for name, n in (("logp", 1), ("logp + entropy", 2)):
        kernel, *others = (lambda *x, f=f, n=n: f(*x)[:n] for f in (linear_logp_triton, *rivals.values()))
        given = h.detach().requires_grad_(), W, targets
        work = {"gradients": (dlogp,) * n, "flops": 2 * flops}
        yield measure.versus(f"backward {name} {shape}", kernel, dict(zip(rivals, others)), *given, **work)
