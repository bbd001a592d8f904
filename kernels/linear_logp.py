"""Log-probability of given tokens from hidden states and a frozen head, without ever holding the logits.

    z = h W^T / tau        logp = z[target] - lse(z)        H = lse(z) - sum_v p_v z_v
    dlogp/dh = (onehot - p) W / tau        dH/dh = -(p * (log p + H)) W / tau

N tokens times V = 151,936 words in fp32 is 10 GB for N = 16,384. The head is frozen, so nothing of that size is needed:
work through the tokens in chunks, keep lse and H, and recompute a chunk's probabilities in the backward pass.
"""

import torch
from torch import Tensor

CHUNK = 1 << 24  # logits held at a time


def _chunks(n: int, V: int):
    step = max(1, CHUNK // V)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, targets, temperature):
        N, V = h.size(0), W.size(0)
        logp, entropy, lse = (torch.empty(N, dtype=_wide(h[:0]).dtype, device=h.device) for _ in range(3))
        for c in _chunks(N, V):
            z = _wide(h[c] @ W.T).div_(temperature)  # (C, V)
            lse[c] = z.logsumexp(-1)
            logp[c] = z.gather(1, targets[c, None])[:, 0] - lse[c]
            entropy[c] = lse[c] - (z.sub(lse[c, None]).exp_().mul_(z)).sum(-1)
        ctx.save_for_backward(h, W, targets, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        h, W, targets, lse, entropy = ctx.saved_tensors
        dh = torch.empty_like(h)
        for c in _chunks(h.size(0), W.size(0)):
            logits = _wide(h[c] @ W.T).div_(ctx.temperature).sub_(lse[c, None])  # (C, V) log-probabilities
            p = logits.exp()
            dz = p * -(dlogp[c, None] + dentropy[c, None] * (logits + entropy[c, None]))
            dz.scatter_add_(1, targets[c, None], dlogp[c, None])
            dh[c] = (dz.div_(ctx.temperature).to(h.dtype)) @ W
        return dh, None, None, None


def linear_logp_torch(
    h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The reference: h (N, d), W (V, d), targets (N,) -> log-probs (N,) and entropies (N,) in nats, fp32 (fp64 for fp64).

    Gradients flow into h alone: the head is frozen.
    """
    return _LinearLogp.apply(h, W, targets, temperature)


linear_logp = linear_logp_torch
