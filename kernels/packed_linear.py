"""Products with a frozen matrix on a CPU, from a copy that oneDNN has laid out for few rows.

Sampling multiplies a handful of rows with every matrix of the body, once a token. torch uses a library made
for large products; its own compiler packs frozen matrices beforehand, with the two operators used here. Some
builds of torch lack them, and bf16 needs AVX-512 or AVX-NE-CONVERT on x86. They have no gradients.

An Intel Xeon without AMX multiplied 128 rows of bf16 at half the rate of fp32, and 8 rows a little faster. On
such CPUs many rows use a copy in fp32, of the same values; on those that cannot pack bf16 all rows do.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 16  # rows from which on arithmetic weighs more than reading the matrix


@dataclass(frozen=True)
class Packed:
    """A matrix (d_out, d_in) in oneDNN's layout and its bias (d_out,); `weight.dtype` is what x must have."""

    weight: Tensor
    bias: Tensor | None


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch packs and multiplies `dtype` on this CPU: tried out, as its flags vary by version."""
    try:
        W = torch.zeros(16, 16, dtype=dtype, device="cpu")
        packed_linear(W[:2], W, pack(W, None, dtype))
        return True
    except (AttributeError, RuntimeError):  # no such operator; not of this type on this CPU
        return False


def fast_type(dtype: torch.dtype, rows: int) -> torch.dtype | None:
    """The best type on this CPU of copies of a matrix of `dtype`, for so many rows; None: no copies."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    slow = "Intel" in known.get("cpu_name", "") and not known.get("amx_bf16")
    if dtype == torch.bfloat16 and not (slow and rows >= MANY) and can_pack(dtype):
        return dtype
    return torch.float32 if dtype in (torch.float32, torch.bfloat16) and can_pack(torch.float32) else None


def pack(W: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Packed:
    """A copy of W (d_out, d_in) in a type that `fast_type` gave, for `packed_linear`."""
    W = W.to(dtype).contiguous()
    return Packed(torch.ops.mkldnn._reorder_linear_weight(W, 32), None if bias is None else bias.to(dtype))


def packed_linear(x: Tensor, W: Tensor, packed: Packed) -> Tensor:
    """x (..., d_in) of the packed type, W (d_out, d_in) and `pack` of it -> (..., d_out)."""
    if x.dtype == W.dtype == torch.float32 and x.numel() == x.size(-1):  # bound by memory either way
        return F.linear(x, W, packed.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
