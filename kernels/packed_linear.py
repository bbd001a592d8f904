"""The product with a frozen matrix on a CPU, from a copy of it that oneDNN has laid out for few rows.

Sampling multiplies a handful of rows with every matrix of the body, once a token. torch hands such products
to a library made for large ones; the compilers of torch lay frozen matrices out anew beforehand, with the two
operators used here. Only where they exist (x86 and ARM builds of torch), and only without gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(W: Tensor) -> Tensor | None:
    """A copy of W (d_out, d_in) for `packed_linear`, as large as W; None where this cannot be had."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
    if not known or W.device.type != "cpu" or W.dtype not in (torch.float32, torch.bfloat16):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), 32)


def packed_linear(x: Tensor, W: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in), W (d_out, d_in) and `pack` of it, bias (d_out,) -> (..., d_out)."""
    if x.dtype == torch.float32 and x.numel() == x.size(-1):  # one row: bound by memory either way
        return F.linear(x, W, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
