"""SwiGLU (arXiv 2002.05202): the gate and the value come from one matmul, side by side.

y = silu(g) * u        [g, u] = halves of x
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """The reference: (..., 2f) -> (..., f)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


swiglu = swiglu_torch
