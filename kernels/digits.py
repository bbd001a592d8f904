"""Products of fp32 rows with a matrix of whole numbers on a CPU, through the CPU's products of 8 bits.

A row x = s X with whole numbers |X| <= 127 * 2^16, and X = 65536 a + 256 b + c with three digits of 8 bits:

    x M^T = s (65536 a M^T + 256 b M^T + c M^T)

The three products are sums of whole numbers, exact but for sums over 2^24, which are rounded to fp32; x loses
2^-24 of the row's largest number, about what fp32 loses. However a batch is cut into rows, sampling and
training round alike. CPUs with VNNI or AMX multiply 8 bits 4 to 16 times as fast as fp32, and M takes a
quarter of the bytes.

torch's own products of 8-bit weights (_weight_int8pack_mm) round x to bf16, and are slower from 32 rows on.
"""

from functools import cache

import torch
from torch import Tensor

UNIT = 127 << 16  # the largest X
ZERO = 128  # is added to a digit: CPUs with VNNI alone multiply unsigned rows with signed columns
ZEROS = torch.tensor(float(ZERO * 0x10101))
WORTH = torch.tensor([[1.0, 256.0, 65536.0]]) / UNIT  # of c, b and a
NO_ZERO = torch.zeros(1, dtype=torch.long)
PARTS = 2**19  # numbers of each of the three products at a time, which are added before they leave the caches


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
    """x (N, d) in fp32 -> its digits c, b and a, each + ZERO, (3, N, d) uint8; and UNIT s (N, 1)."""
    top = x.abs().amax(1, keepdim=True)  # 0 / 0 is some whole number, and times 0 in the end
    X = torch.addcdiv(ZEROS, x, top, value=UNIT).round_().to(torch.int32)  # all three + ZERO: below 2^24
    out = torch.empty(3, *x.shape, dtype=torch.uint8)
    for i in range(3):
        out[i] = X if i == 0 else X.bitwise_right_shift_(8)  # the lowest byte
    return out, top


def digit_product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, d_in), M (d_out, d_in) as `pack` makes it, scale and bias (d_out,) -> (x M^T) scale + bias."""
    y = torch.empty(len(x), len(scale))
    rows = min(256, max(16, PARTS // len(scale)))
    for part, out in zip(x.split(rows), y.split(rows)):
        d, top = digits(part.float())
        given = d.flatten(0, 1), 1.0, ZERO, packed, scale, NO_ZERO, None, 1.0, 0, torch.float32
        parts = torch.ops.onednn.qlinear_pointwise(*given, "none", [], "")
        torch.mm(WORTH, parts.view(3, -1), out=out.view(1, -1))
        out.mul_(top)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
