"""The product with a frozen matrix on a CPU, from a copy of it that oneDNN has laid out for few rows.

Sampling multiplies a handful of rows with every matrix of the body, once a token. torch hands such products
to a library made for large ones; the compilers of torch lay frozen matrices out anew beforehand, with the two
operators used here. Only where they exist (x86 and ARM builds of torch), and only without gradients.

An Intel Xeon without AMX multiplied 128 rows of bf16 at half the rate of fp32, and 8 rows a little faster. On
such processors many rows meet a copy in fp32, of the same values; a few rows one in bf16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 16  # rows from which on arithmetic weighs more than reading the matrix


@dataclass(frozen=True)
class Packed:
    """A matrix (d_out, d_in) in oneDNN's layout and its bias (d_out,); `weight.dtype` is what x must have."""

    weight: Tensor
    bias: Tensor | None


def fast_type(dtype: torch.dtype, rows: int) -> torch.dtype:
    """The type in which this CPU is to multiply so many rows with matrices of `dtype`."""
    can = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    slow = "Intel" in can.get("cpu_name", "") and not can.get("amx_bf16")
    return torch.float32 if slow and rows >= MANY and dtype == torch.bfloat16 else dtype


def pack(W: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Packed | None:
    """A copy of W (d_out, d_in) in a type, for `packed_linear`; None where this cannot be had."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
    if not known or W.device.type != "cpu" or W.dtype not in (torch.float32, torch.bfloat16):
        return None
    W = W.to(dtype).contiguous()
    return Packed(torch.ops.mkldnn._reorder_linear_weight(W, 32), None if bias is None else bias.to(dtype))


def packed_linear(x: Tensor, W: Tensor, packed: Packed) -> Tensor:
    """x (..., d_in) of the packed type, W (d_out, d_in) and `pack` of it -> (..., d_out)."""
    if x.dtype == W.dtype == torch.float32 and x.numel() == x.size(-1):  # bound by memory either way
        return F.linear(x, W, packed.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
