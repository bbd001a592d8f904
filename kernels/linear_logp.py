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

import torch
from torch import Tensor

from .launch import Target, check, choose, target, tl, triton

CHUNK = 1 << 20  # logits that the reference holds at a time: they stay in a CPU's cache
STRIPED = 4096  # tokens a launch: the partials of their stripes take 58 MB at V = 151,936
BUFFER = 160 << 20  # bytes of dz held at a time: 512 tokens at V = 151,936 in bf16


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(n: int, step: int):
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def statistics_torch(h: Tensor, W: Tensor, targets: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
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


def dlogits_torch(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """All (N, ...) but W and tau; dentropy may be None -> the gradient of h W^T, (N, V) in the type of h."""
    dz = _wide(h @ W.T).div_(tau).sub_(lse[:, None])  # (N, V) log-probabilities
    if dentropy is None:
        dz.exp_().mul_(-dlogp[:, None])
    else:
        p = dz.exp()
        dz.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p).neg_()
    dz.scatter_add_(1, targets[:, None], dlogp[:, None])
    return dz.div_(tau).to(h.dtype)


class _LinearLogp(torch.autograd.Function):
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
            dentropy_c = None if dentropy is None else dentropy[c]
            dz = ctx.dlogits(h[c], W, targets[c], ctx.tau, lse[c], entropy[c], dlogp[c], dentropy_c)
            torch.mm(dz, W, out=dh[c])
        return dh, None, None, None, None, None, None


def linear_logp_torch(
    h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The reference: h (N, d), W (V, d), targets (N,) -> log-probs and entropies (N,) in nats, fp32 or wider.

    Gradients flow into h alone: the head is frozen.
    """
    step = max(128, CHUNK // len(W))
    return _LinearLogp.apply(h, W, targets, temperature, statistics_torch, dlogits_torch, step)


@triton.jit
def _logits(p_h, p_w, i_n, i_v, n, v, D: tl.constexpr, BLOCK_D: tl.constexpr, acc):
    """acc + h[i_n] W[i_v]^T. Indices past the end repeat the last row: what they give is never used."""
    i_d = tl.arange(0, BLOCK_D)
    p_h += tl.minimum(i_n, n - 1).to(tl.int64)[:, None] * D + i_d[None, :]
    p_w += tl.minimum(i_v, v - 1).to(tl.int64)[None, :] * D + i_d[:, None]
    for d in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            b_h, b_w = tl.load(p_h), tl.load(p_w)
        else:
            m_d = i_d < D - d
            b_h, b_w = tl.load(p_h, m_d[None, :], 0.0), tl.load(p_w, m_d[:, None], 0.0)
        acc = tl.dot(b_h, b_w, acc, input_precision="ieee")
        p_h += BLOCK_D
        p_w += BLOCK_D
    return acc


@triton.jit
def _tile(n, BLOCK_N: tl.constexpr):
    """Which rows and which block of words this program has. Neighbours share words: W streams through L2."""
    pid, blocks = tl.program_id(0), tl.cdiv(n, BLOCK_N)
    return pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N), pid // blocks


@triton.jit
def _leave(z, stripe, at, i_n, p_max, p_sum, p_dev, p_target_z, n, v, stripes, WIDTH: tl.constexpr):
    """A stripe's logits z (rows, WIDTH) -> its partials, and the logits of the targets `at` within it."""
    i_v, m_n = stripe * WIDTH + tl.arange(0, WIDTH), i_n < n
    b_target_z = tl.sum(tl.where(i_v[None, :] == at[:, None], z, 0.0), 1)
    tl.store(p_target_z + i_n, b_target_z, m_n & (at // WIDTH == stripe))
    z = tl.where(i_v[None, :] < v, z, -1e30)
    top = tl.max(z, 1)
    z -= top[:, None]
    e = tl.exp2(z)
    p_out = i_n.to(tl.int64) * stripes + stripe
    tl.store(p_max + p_out, top, m_n)
    tl.store(p_sum + p_out, tl.sum(e, 1), m_n)
    tl.store(p_dev + p_out, tl.sum(e * z, 1), m_n)


@triton.jit
def _stripe_kernel(
    p_h, p_w, p_targets, p_max, p_sum, p_dev, p_target_z, scale, n, v, stripes,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n, block = _tile(n, BLOCK_N)
    i_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    z = _logits(p_h, p_w, i_n, i_v, n, v, D, BLOCK_D, z) * scale
    at = tl.load(p_targets + i_n, i_n < n, other=-1)
    WIDTH: tl.constexpr = BLOCK_V // 2
    # two stripes, one after the other: with the whole tile's exponentials alive, 72 bytes spill on sm_90
    z_0, z_1 = tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, WIDTH)), (0, 2, 1)))
    _leave(z_0, 2 * block, at, i_n, p_max, p_sum, p_dev, p_target_z, n, v, stripes, WIDTH)
    _leave(z_1, 2 * block + 1, at, i_n, p_max, p_sum, p_dev, p_target_z, n, v, stripes, WIDTH)


@triton.jit
def _merge_kernel(p_max, p_sum, p_dev, p_target_z, p_logp, p_entropy, p_lse, stripes, BLOCK_S: tl.constexpr):
    row, i_s = tl.program_id(0), tl.arange(0, BLOCK_S)
    m_s, at = i_s < stripes, row * stripes + i_s
    b_max = tl.load(p_max + at, m_s, other=-1e30)
    b_sum = tl.load(p_sum + at, m_s, other=0.0)
    b_dev = tl.load(p_dev + at, m_s, other=0.0)
    top = tl.max(b_max, 0)
    gap = b_max - top
    s = tl.sum(tl.exp2(gap) * b_sum, 0)
    t = tl.sum(tl.exp2(gap) * (b_dev + gap * b_sum), 0)
    LN2: tl.constexpr = 0.6931471805599453
    tl.store(p_logp + row, LN2 * ((tl.load(p_target_z + row) - top) - tl.log2(s)))
    tl.store(p_entropy + row, LN2 * (tl.log2(s) - t / s))
    tl.store(p_lse + row, top + tl.log2(s))


@triton.jit
def _dlogits_kernel(
    p_h, p_w, p_targets, p_lse, p_entropy, p_dlogp, p_dentropy, p_dz, scale, inv_tau, n, v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
):  # fmt: skip
    i_n, block = _tile(n, BLOCK_N)
    i_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    z = _logits(p_h, p_w, i_n, i_v, n, v, D, BLOCK_D, z) * scale
    m_n = i_n < n
    at = tl.load(p_targets + i_n, m_n, other=-1)
    z -= tl.load(p_lse + i_n, m_n, other=0.0)[:, None]  # log2 p
    b_dlogp = (tl.load(p_dlogp + i_n, m_n, other=0.0) * inv_tau)[:, None]
    LN2: tl.constexpr = 0.6931471805599453
    slope = b_dlogp
    if HAS_DENTROPY:
        b_dentropy = tl.load(p_dentropy + i_n, m_n, other=0.0) * inv_tau
        b_entropy = tl.load(p_entropy + i_n, m_n, other=0.0)
        slope = b_dlogp + b_dentropy[:, None] * (LN2 * z + b_entropy[:, None])
    dz = tl.where(i_v[None, :] == at[:, None], b_dlogp, 0.0) - tl.exp2(z) * slope
    p_out = p_dz + i_n.to(tl.int64)[:, None] * v + i_v[None, :]
    tl.store(p_out, dz.to(p_dz.dtype.element_ty), m_n[:, None] & (i_v < v)[None, :])


def config(dtype: torch.dtype, d: int, t: Target) -> dict:
    """Blocks, warps and stages of the two kernels that multiply by the head."""
    BLOCK_D = min(64, max(16, triton.next_power_of_2(d)))
    if dtype == torch.float32:  # no tensor cores: this is for tests and small models
        return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=min(32, BLOCK_D), num_warps=4, num_stages=2)
    BLOCK_V, num_stages = {90: (256, 4), 100: (128, 4)}.get(t.arch, (128, 2) if t.hip else (256, 3))
    return dict(BLOCK_N=128, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, num_warps=8, num_stages=num_stages)


def statistics_triton(h: Tensor, W: Tensor, targets: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """As statistics_torch, but the log-sum-exps are in base 2."""
    (N, d), V, c = h.shape, len(W), config(h.dtype, h.size(1), target())
    logp, entropy, lse = (h.new_empty(N, dtype=torch.float32) for _ in range(3))
    blocks = triton.cdiv(V, c["BLOCK_V"])
    stripes = 2 * blocks
    b_max, b_sum, b_dev = h.new_empty(3, min(N, STRIPED), stripes, dtype=torch.float32)
    target_z = torch.empty_like(logp)
    for s in _chunks(N, STRIPED):
        n = s.stop - s.start
        grid = (triton.cdiv(n, c["BLOCK_N"]) * blocks,)
        _stripe_kernel[grid](
            h[s], W, targets[s], b_max, b_sum, b_dev, target_z[s], math.log2(math.e) / tau, n, V, stripes,
            D=d, **c,
        )  # fmt: skip
        _merge_kernel[(n,)](
            b_max, b_sum, b_dev, target_z[s], logp[s], entropy[s], lse[s], stripes,
            BLOCK_S=triton.next_power_of_2(stripes), num_warps=4,
        )  # fmt: skip
    return logp, entropy, lse


def dlogits_triton(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """As dlogits_torch, with log-sum-exps in base 2."""
    (N, d), V, c = h.shape, len(W), config(h.dtype, h.size(1), target())
    dz = h.new_empty(N, V)
    grid = (triton.cdiv(N, c["BLOCK_N"]) * triton.cdiv(V, c["BLOCK_V"]),)
    _dlogits_kernel[grid](
        h, W, targets, lse, entropy, dlogp, lse if dentropy is None else dentropy.contiguous(), dz,
        math.log2(math.e) / tau, 1 / tau, N, V, D=d, HAS_DENTROPY=dentropy is not None, **c,
    )  # fmt: skip
    return dz


def linear_logp_triton(
    h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As linear_logp_torch, for h and W of one type (bf16, fp16 or fp32) and int64 targets."""
    check(
        h.dim() == W.dim() == 2 and h.size(1) == W.size(1) and targets.shape == h.shape[:1],
        f"linear_logp: h {tuple(h.shape)}, W {tuple(W.shape)} and targets {tuple(targets.shape)} do not fit",
    )
    check(h.dtype == W.dtype, f"linear_logp: h is {h.dtype} but W is {W.dtype}")
    check(W.is_contiguous(), "linear_logp: W must be contiguous")
    step = max(128, BUFFER // (len(W) * h.element_size()) // 128 * 128)
    return _LinearLogp.apply(
        h.contiguous(), W, targets.contiguous(), temperature, statistics_triton, dlogits_triton, step
    )


linear_logp = choose(linear_logp_torch, linear_logp_triton)
