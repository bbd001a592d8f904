"""Products of fp32 rows with a matrix of whole numbers on a CPU, through the CPU's products of 8 bits.

A row x = s X with whole numbers |X| <= 127 * 2^16, and X = 65536 a + 256 b + c with three digits of 8 bits:

    x M^T = s (65536 a M^T + 256 b M^T + c M^T)

The three products are sums of whole numbers, so they are exact, and x loses 2^-24 of the row's largest
number, about what fp32 loses. However a batch is cut into rows, sampling and training round alike. CPUs with
VNNI or AMX multiply 8 bits 4 to 16 times as fast as fp32, and M takes a quarter of the bytes.

torch's own products of 8-bit weights (_weight_int8pack_mm) round x to bf16, and are slower from 32 rows on.
"""

from functools import cache

import torch
from torch import Tensor

UNIT = 127 << 16  # the largest X
NO_ZERO_POINT = torch.zeros(1, dtype=torch.long)
ROWS = 256  # taken at a time: three digits and three products of each are held


def pack(M: Tensor) -> Tensor:
    """A copy of M (d_out, d_in), int8, in oneDNN's layout."""
    return torch.ops.onednn.qlinear_prepack(M.contiguous(), None)


@cache
def can_pack() -> bool:
    """Whether this CPU and torch multiply 8 bits exactly: tried out, as some CPUs saturate sums of two."""
    try:
        M = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
        x = torch.ones(2, 64, device="cpu")
        y = digit_product(x, pack(M), torch.ones(16, device="cpu"), None)
        known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        fast = any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
        return bool(fast and (y == 64 * 127).all())
    except (AttributeError, RuntimeError):  # no such operator, or not on this CPU
        return False


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, d) in fp32 -> its digits c, b and a, (3, N, d) int8, and s (N, 1). A row of zeros has s = 0."""
    s = x.abs().amax(1, keepdim=True) * (1 / UNIT)
    X = (x / s).round_().to(torch.int32)
    out = torch.empty(3, *x.shape, dtype=torch.int8)
    for i, digit in enumerate(out.unbind()):
        digit.copy_(X)  # the lowest byte, with its sign
        if i < 2:
            X.add_(128).bitwise_right_shift_(8)
    return out, s


def digit_product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, d_in), M (d_out, d_in) as `pack` makes it, scale and bias (d_out,) -> (x M^T) scale + bias."""
    y = x.new_empty(len(x), len(scale), dtype=torch.float32)
    for rows, out in zip(x.split(ROWS), y.split(ROWS)):
        d, s = digits(rows.float())
        given = d.flatten(0, 1), 1.0, 0, packed, scale, NO_ZERO_POINT, None, 1.0, 0, torch.float32
        c, b, a = torch.ops.onednn.qlinear_pointwise(*given, "none", [], "").chunk(3)
        torch.mul(c.add_(b, alpha=256).add_(a, alpha=65536), s, out=out)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
