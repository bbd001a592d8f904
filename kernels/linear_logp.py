"""Log-probability of given tokens from hidden states and a frozen head, without ever holding the logits.

    z = h W^T / tau        logp = z[target] - lse(z)        H = lse(z) - sum_v p_v z_v        p = softmax(z)
    dz = (onehot(target) - p) dlogp - p (log p + H) dH        dh = dz W / tau

N = 16,384 tokens times V = 151,936 words is 10 GB in fp32. The head is frozen, so nothing of that size is
needed. Forward: the words fall into stripes; of each row a stripe leaves its maximum m, s = sum e^(z - m)
and t = sum e^(z - m) (z - m). From all the stripes of a row

    m' = max m        s' = sum e^(m - m') s        t' = sum e^(m - m') (t + (m - m') s)
    lse = m' + log s'        H = log s' - t' / s'

Backward: some hundreds of tokens at a time, z once more, dz into a buffer in the type of h, and a cuBLAS
matmul with W. The kernels work in base 2 (z log2 e): an exponential is then one instruction.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import measure
from .launch import Target, check, choose, target, tl, triton

CHUNK = 1 << 20  # logits that the reference holds at a time: they stay in a CPU's cache
STRIPED = 2048  # tokens a launch: the partials of their stripes take up to 58 MB at V = 151,936
BUFFER = 160 << 20  # bytes of dz held at a time: 512 tokens at V = 151,936 in bf16


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(n: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _statistics_torch(h: Tensor, W: Tensor, targets: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """h (N, d), W (V, d), targets (N,) -> log-probs, entropies and log-sum-exps (N,), in fp32 or wider."""
    logp, entropy, lse = (_wide(h[:, 0]).new_empty(len(h)) for _ in range(3))
    for c in _chunks(len(h), max(128, CHUNK // len(W))):
        z = _wide(h[c] @ W.T).div_(tau)  # (C, V)
        top = z.amax(-1, keepdim=True)
        e = z.sub_(top).exp()
        s = e.sum(-1)
        logp[c] = z.gather(1, targets[c, None])[:, 0] - s.log()
        entropy[c] = s.log() - torch.linalg.vecdot(e, z) / s
        lse[c] = top[:, 0] + s.log()
    return logp, entropy, lse


def _dlogits_torch(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """All (N, ...) but W and tau; dentropy may be None -> the gradient of h W^T, (N, V) in the type of h."""
    dz = _wide(h @ W.T).div_(tau).sub_(lse[:, None])  # (N, V) log p
    if dentropy is None:
        dz.exp_().mul_(-dlogp[:, None])
    else:
        p = dz.exp()
        dz.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p).neg_()
    dz.scatter_add_(1, targets[:, None], dlogp[:, None])
    return dz.div_(tau).to(h.dtype)


class _LinearLogp(torch.autograd.Function):
    """For the reference and for the kernels, which differ in `statistics` and `dlogits`."""

    @staticmethod
    def forward(ctx, h, W, targets, tau, statistics, dlogits, step):
        logp, entropy, lse = statistics(h, W, targets, tau)
        ctx.save_for_backward(h, W, targets, lse, entropy)
        ctx.tau, ctx.dlogits, ctx.step = tau, dlogits, step
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        h, W, targets, lse, entropy = ctx.saved_tensors
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
        dh = torch.empty_like(h)
        for c in _chunks(len(h), ctx.step):
            mine = None if dentropy is None else dentropy[c].contiguous()
            dz = ctx.dlogits(h[c], W, targets[c], ctx.tau, lse[c], entropy[c], dlogp[c], mine)
            torch.mm(dz, W, out=dh[c])
        return dh, None, None, None, None, None, None


def linear_logp_torch(
    h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The reference: h (N, d), W (V, d), targets (N,) -> log-probs and entropies (N,) in nats, fp32 or wider.

    Gradients flow into h alone: the head is frozen.
    """
    step = max(128, CHUNK // len(W))
    return _LinearLogp.apply(h, W, targets, temperature, _statistics_torch, _dlogits_torch, step)


@triton.jit
def _logits(p_h, p_w, i_n, i_v, n_rows, n_words, D: tl.constexpr, BLOCK_D: tl.constexpr, z):
    """z + h[i_n] W[i_v]^T. Indices past the end repeat the last row: what they give is never used."""
    i_d = tl.arange(0, BLOCK_D)
    p_h += tl.minimum(i_n, n_rows - 1).to(tl.int64)[:, None] * D + i_d[None, :]
    p_w += tl.minimum(i_v, n_words - 1).to(tl.int64)[None, :] * D + i_d[:, None]
    for d in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            h, w = tl.load(p_h), tl.load(p_w)
        else:
            m_d = i_d < D - d
            h, w = tl.load(p_h, m_d[None, :], 0.0), tl.load(p_w, m_d[:, None], 0.0)
        z = tl.dot(h, w, z, input_precision="ieee")
        p_h += BLOCK_D
        p_w += BLOCK_D
    return z


@triton.jit
def _tile(n_rows, BLOCK_N: tl.constexpr):
    """Which rows and which block of words this program has. Neighbours share words: W streams through L2."""
    i, n_blocks = tl.program_id(0), tl.cdiv(n_rows, BLOCK_N)
    return i % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N), i // n_blocks


@triton.jit
def _leave(z, stripe, at, i_n, p_top, p_sum, p_dev, p_z_at, n_rows, n_words, n_stripes, WIDTH: tl.constexpr):
    """A stripe's logits z (rows, WIDTH) -> its partials, and the logits of the targets `at` within it."""
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
def _stripe_kernel(
    p_h, p_w, p_targets, p_top, p_sum, p_dev, p_z_at, scale, n_rows, n_words, n_stripes,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n, block = _tile(n_rows, BLOCK_N)
    i_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    z = _logits(p_h, p_w, i_n, i_v, n_rows, n_words, D, BLOCK_D, z) * scale
    at = tl.load(p_targets + i_n, i_n < n_rows, other=-1).to(tl.int32)
    WIDTH: tl.constexpr = BLOCK_V // 2
    # Two stripes, one after the other: with the exponentials of both alive, sm_90 spills 72 bytes.
    z_0, z_1 = tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, WIDTH)), (0, 2, 1)))
    _leave(z_0, 2 * block, at, i_n, p_top, p_sum, p_dev, p_z_at, n_rows, n_words, n_stripes, WIDTH)
    _leave(z_1, 2 * block + 1, at, i_n, p_top, p_sum, p_dev, p_z_at, n_rows, n_words, n_stripes, WIDTH)


@triton.jit
def _merge_kernel(p_top, p_sum, p_dev, p_z_at, p_logp, p_entropy, p_lse, n_stripes, BLOCK_S: tl.constexpr):
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


@triton.jit
def _dlogits_kernel(
    p_h, p_w, p_targets, p_lse, p_entropy, p_dlogp, p_dentropy, p_dz, scale, inverse_tau, n_rows, n_words,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    i_n, block = _tile(n_rows, BLOCK_N)
    i_v, m_n = block * BLOCK_V + tl.arange(0, BLOCK_V), i_n < n_rows
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    z = _logits(p_h, p_w, i_n, i_v, n_rows, n_words, D, BLOCK_D, z) * scale
    z -= tl.load(p_lse + i_n, m_n, other=0.0)[:, None]  # log2 p
    at = tl.load(p_targets + i_n, m_n, other=-1).to(tl.int32)
    dlogp = (tl.load(p_dlogp + i_n, m_n, other=0.0) * inverse_tau)[:, None]
    slope = dlogp
    if ENTROPY:
        dentropy = tl.load(p_dentropy + i_n, m_n, other=0.0) * inverse_tau
        entropy = tl.load(p_entropy + i_n, m_n, other=0.0)
        slope = dlogp + dentropy[:, None] * (LN2 * z + entropy[:, None])
    dz = tl.where(i_v[None, :] == at[:, None], dlogp, 0.0) - tl.exp2(z) * slope
    i_out = i_n.to(tl.int64)[:, None] * n_words + i_v[None, :]
    tl.store(p_dz + i_out, dz.to(p_dz.dtype.element_ty), m_n[:, None] & (i_v < n_words)[None, :])


def config(dtype: torch.dtype, d: int, t: Target) -> dict:
    """Blocks, warps and stages of the two kernels that multiply by the head."""
    BLOCK_D = min(64, max(16, triton.next_power_of_2(d)))
    if dtype == torch.float32:  # no tensor cores: for tests and small models
        return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=min(32, BLOCK_D), num_warps=4, num_stages=2)
    BLOCK_V = 256 if t.arch == 90 else 128  # mma.sync spills at 256 with the entropy, tcgen05 without
    return dict(BLOCK_N=128, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, num_warps=8, num_stages=2 if t.hip else 4)


def _statistics_triton(h: Tensor, W: Tensor, targets: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """As _statistics_torch, but the log-sum-exps are in base 2."""
    (N, d), V, c = h.shape, len(W), config(h.dtype, h.size(1), target())
    logp, entropy, lse, z_at = h.new_empty(4, N, dtype=torch.float32)
    blocks = triton.cdiv(V, c["BLOCK_V"])
    top, s, dev = h.new_empty(3, min(N, STRIPED), 2 * blocks, dtype=torch.float32)
    for n in _chunks(N, STRIPED):
        rows = n.stop - n.start
        grid = (triton.cdiv(rows, c["BLOCK_N"]) * blocks,)
        _stripe_kernel[grid](
            h[n], W, targets[n], top, s, dev, z_at[n], math.log2(math.e) / tau, rows, V, 2 * blocks, D=d, **c
        )
        _merge_kernel[(rows,)](
            top, s, dev, z_at[n], logp[n], entropy[n], lse[n], 2 * blocks,
            BLOCK_S=triton.next_power_of_2(2 * blocks),
        )  # fmt: skip
    return logp, entropy, lse


def _dlogits_triton(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """As _dlogits_torch, with log-sum-exps in base 2."""
    (N, d), V, c = h.shape, len(W), config(h.dtype, h.size(1), target())
    dz = h.new_empty(N, V)
    grid = (triton.cdiv(N, c["BLOCK_N"]) * triton.cdiv(V, c["BLOCK_V"]),)
    _dlogits_kernel[grid](
        h, W, targets, lse, entropy, dlogp, dentropy, dz, math.log2(math.e) / tau, 1 / tau, N, V,
        D=d, ENTROPY=dentropy is not None, **c,
    )  # fmt: skip
    return dz


def linear_logp_triton(
    h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same on a GPU. ValueError if shapes or types disagree; fp32 and halves only."""
    check(
        h.dim() == W.dim() == 2 and h.size(1) == W.size(1) and targets.shape == h.shape[:1],
        f"h {tuple(h.shape)}, W {tuple(W.shape)} and targets {tuple(targets.shape)} do not fit",
    )
    check(h.dtype == W.dtype, f"h is {h.dtype}, W {W.dtype}: must be the same")
    check(h.dtype != torch.float64, "fp64 has no kernel: set KERNELS=torch")
    check(W.is_contiguous(), "W must be contiguous: it is too large to copy")
    step = max(128, BUFFER // (len(W) * h.element_size()) // 128 * 128)
    h, targets = h.contiguous(), targets.contiguous()
    return _LinearLogp.apply(h, W, targets, temperature, _statistics_triton, _dlogits_triton, step)


linear_logp = choose(linear_logp_torch, linear_logp_triton)


def _logits_at_once(h: Tensor, W: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What most programs do: all logits, cuBLAS and log_softmax."""
    logp = torch.log_softmax(h @ W.T, -1, dtype=torch.float32)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def cases(m: measure.Model, device: str) -> Iterator[measure.Case]:
    """The tokens of a training batch, forward; backward with and without the entropy."""
    N = m.batch * m.length
    h = torch.randn(N, m.d, dtype=m.dtype, device=device, requires_grad=True)
    W = torch.randn(m.vocab, m.d, dtype=m.dtype, device=device) / m.d**0.5
    targets = torch.randint(m.vocab, (N,), device=device)
    forward = 2 * N * m.vocab * m.d
    rivals = {"torch": linear_logp_torch, "logits": _logits_at_once}
    yield measure.Case(
        f"forward {N} x {m.vocab}",
        lambda: linear_logp_triton(h.detach(), W, targets),
        {k: lambda f=f: f(h.detach(), W, targets) for k, f in rivals.items()}
        | {"matmul": lambda: h.detach() @ W.T},
        flops=forward,
    )
    for name, both in (("logp", 1), ("logp + entropy", 2)):
        dlogp = (torch.randn(N, device=device),) * both
        of = lambda f: measure.backward(f(h, W, targets)[:both], (h,), dlogp)  # noqa: B023, E731
        yield measure.Case(
            f"backward {name} {N} x {m.vocab}",
            of(linear_logp_triton),
            {"torch": of(linear_logp_torch)},
            flops=2 * forward,
        )


if __name__ == "__main__":
    measure.main("linear_logp")
