"""RMSNorm (arXiv 1910.07467), with the residual addition of a pre-norm block.

    y = x / sqrt(mean(x^2) + eps) * w

Rounding as in Llama and Qwen: normalise in fp32, cast to the type of x, then scale.
"""

import torch
from torch import Tensor


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """The reference: x (..., d), weight (d,) -> y; with a residual (..., d): (y of their sum, the sum)."""
    if residual is not None:
        x = x + residual
    x32 = x.float() if x.dtype != torch.float64 else x
    y = weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if residual is None else (y, x)


rms_norm = rms_norm_torch
