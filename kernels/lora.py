"""LoRA (arXiv 2106.09685) with one role a row, for decoding.

    y[b] += scale[r] (x[b] A[r]^T) B[r]^T        r = role[b]; role 0 is the reference and adds nothing

Policy and simulator rows sit in the same batch. The reference multiplies all rows by all adapters and masks the thin
middle, which costs little, has no data-dependent shape, and needs no sorting.
"""

import torch
from torch import Tensor


def lora_torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, role: Tensor, scale: Tensor) -> Tensor:
    """The reference: y (B, T, o), x (B, T, i), A (R, k, i), B (R, o, k), role (B,), scale (R,) -> y + update.

    The adapter of role r is A[r - 1], B[r - 1].
    """
    R, k, _ = A.shape
    mine = (role[:, None] == torch.arange(1, R + 1, device=role.device)).to(x.dtype) * scale.to(
        x.dtype
    )  # (B, R)
    middle = (x @ A.flatten(0, 1).T).unflatten(-1, (R, k)) * mine[:, None, :, None]  # (B, T, R, k)
    return y + middle.flatten(-2) @ B.transpose(1, 2).flatten(0, 1)


lora = lora_torch
