"""Sampling: one keyed uniform a row, through the inverse of the cumulative distribution.

    id = min { v : sum_{w <= v} p_w > u },   p = softmax(z / tau);        logp = log p[id]

One pass gives the id and its log-probability, so training needs no second forward for the old log-probs.
tau = 0 is greedy; its logp is that of tau = 1.
"""

import torch
from torch import Tensor


def sample_torch(logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: logits (B, V), u (B,) in [0, 1), temperature (B,) -> ids (B,) int64, logp (B,) fp32."""
    greedy = temperature == 0
    z = logits.float() / torch.where(greedy, 1, temperature)[:, None]
    logp = z.log_softmax(-1)  # (B, V)
    cdf = logp.exp().cumsum(-1)
    ids = torch.searchsorted(cdf, (u.to(cdf.dtype) * cdf[:, -1])[:, None], right=True)[:, 0]
    ids = torch.where(greedy, logits.argmax(-1), ids.clamp(max=logits.size(1) - 1))
    return ids, logp.gather(1, ids[:, None])[:, 0]


sample = sample_torch
