"""Products with a frozen matrix on a CPU, from a copy that oneDNN has laid out for few rows.

Sampling multiplies a handful of rows with every matrix of the body, once a token. torch hands such products
to a library made for large ones; its own compiler lays frozen matrices out anew beforehand, with the two
operators used here. They are missing from some builds of torch, and take bf16 only on some CPUs (x86: AVX-512
or AVX-NE-CONVERT). They have no gradients.

An Intel Xeon without AMX multiplied 128 rows of bf16 at half the rate of fp32, and 8 rows a little faster. On
such processors many rows are multiplied with a copy in fp32, of the same values, and a few with one in bf16.
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
    """Whether this build of torch packs and multiplies `dtype` on this CPU. It is tried: flags that tell are
    named otherwise on each architecture, and missing from older versions.
    """
    try:
        W = torch.zeros(16, 16, dtype=dtype, device="cpu")
        packed_linear(W[:2], W, pack(W, None, dtype))
        return True
    except (AttributeError, RuntimeError):  # no such operator; not of this type on this CPU
        return False


def fast_type(dtype: torch.dtype, rows: int) -> torch.dtype | None:
    """The type of the copies with which this CPU is to multiply so many rows; None: make none.

    A body in bf16 has them in fp32 where that is faster, or where bf16 cannot be packed.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    slow = "Intel" in known.get("cpu_name", "") and not known.get("amx_bf16")
    narrow = dtype == torch.bfloat16 and not (slow and rows >= MANY) and can_pack(dtype)
    if narrow:
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
