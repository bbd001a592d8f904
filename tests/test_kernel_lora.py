"""LoRA in decoding, one role a row, against float64."""

import pytest
import torch

from kernels.lora import below, expand_torch, expand_triton, lora_torch, lora_triton
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
BOTH = pytest.mark.parametrize("function", [lora_torch, lora_triton])
EXPANDS = pytest.mark.parametrize("function", [expand_torch, expand_triton])
DTYPES = pytest.mark.parametrize("dtype", BOUND)
SIZES = pytest.mark.parametrize(
    "b,T,i,o,k",
    [
        (1, 1, 64, 96, 48),
        (65, 1, 48, 100, 16),
        (3, 1, 1100, 33, 96),
        (3, 21, 40, 72, 24),
        (111, 1, 16, 40, 8),
        (7, 3, 37, 53, 5),
    ],
    ids=str,
)


def rows(b, T, i, o, k, dtype, device, R=2):
    """y, x, A, B, weight of a batch in which no adapter and each of R take turns."""
    torch.manual_seed(0)
    y, x = torch.randn(b, T, o, device=device), torch.randn(b, T, i, device=device)
    A, B = torch.randn(R, k, i, device=device) / i**0.5, torch.randn(R, k, o, device=device)
    role, scale = (torch.arange(b) + 1) % (R + 1), torch.arange(R) + 0.7
    weight = torch.where(role[:, None] == torch.arange(1, R + 1), scale, 0).to(device)  # (b, R)
    return *(t.to(dtype) for t in (y, x, A, B)), weight


def truth(y, x, A, B, weight):
    """Row by row, in float64."""
    out = y.double()
    for b, r in weight.nonzero().tolist():
        out[b] += weight[b, r].double() * x[b].double() @ A[r].double().T @ B[r].double()
    return out


@BOTH
@DTYPES
@SIZES
def test_rows_with_roles_equal_fp64(device, filled_with_nan, function, b, T, i, o, k, dtype):
    """A rank that is no power of two, a sum split over programs, a block half empty, a role mistaken."""
    args = rows(b, T, i, o, k, dtype, device)
    want = truth(*args)
    assert relative_rms(function(*args), want) <= BOUND[dtype]


@BOTH
def test_in_place_and_the_reference_untouched(device, function):
    """y is large and fresh: the update goes onto it. A row of role 0 must not change by a bit."""
    y, x, A, B, weight = rows(6, 1, 32, 48, 16, torch.bfloat16, device)
    before = y.clone()
    assert function(y, x, A, B, weight) is y
    changed = (y != before).any(-1)[:, 0]
    assert changed.tolist() == (weight > 0).any(1).tolist()


def test_order_of_programs_changes_nothing(device, filled_with_nan, program_order):
    """The splits are added by the second launch, never by each other."""
    args = rows(17, 1, 1103, 71, 13, torch.float32, device)
    want = truth(*args)
    assert relative_rms(lora_triton(*args), want) <= BOUND[torch.float32]


@pytest.mark.parametrize("name", ["sm_86", "gfx942"])
def test_other_targets(device, pretend_to_be, name):
    """Fewer processors, smaller blocks: other splits of the same sum."""
    args = rows(20, 1, 1103, 41, 47, torch.bfloat16, device)
    want = truth(*args)
    with pretend_to_be(name):
        assert relative_rms(lora_triton(*args), want) <= BOUND[torch.bfloat16]


def test_rows_know_nothing_of_each_other(device):
    """Another seat's tenant, even one that overflowed, must not change a row by a bit."""
    y, x, A, B, weight = rows(7, 1, 64, 48, 16, torch.bfloat16, device)
    before = lora_triton(y.clone(), x, A, B, weight)
    x[4:], y[4:] = torch.inf, torch.nan
    after = lora_triton(y.clone(), x, A, B, weight)
    assert torch.equal(before[:4], after[:4])


def test_bad_rows(device):
    """An adapter of another layer would be read past its end."""
    y, x, A, B, weight = rows(3, 1, 32, 48, 16, torch.float32, device)
    for bad in (
        (y, x, A[:, :, :16], B, weight),
        (y, x, A, B.transpose(1, 2), weight),
        (y, x, A, B, weight[:2]),
        (y, x, A, B, weight[:, :1]),
        (y, x, A.bfloat16(), B, weight),
        (y.transpose(0, 2).contiguous().transpose(0, 2), x, A, B, weight),
    ):
        with pytest.raises(ValueError):
            lora_triton(*bad)


def beside(y, x, A, B, weight, fill=torch.nan):
    """What the product of x with W and the A below it gives: y, x A^T of all roles, and what the padding of
    that matrix gives. And truth: the middle as it was rounded there."""
    middle = torch.einsum("bti,rki->btrk", x.float(), A.float()).to(y.dtype)
    n = middle[0, 0].numel()
    z = torch.cat((y, middle.flatten(2), y.new_full((*y.shape[:2], below(n) - n), fill)), 2)
    rows = middle.double() * weight[:, None, :, None].double()
    return z, y.double() + torch.einsum("btrk,rko->bto", rows, B.double())


@EXPANDS
@DTYPES
@SIZES
def test_a_middle_that_lies_beside_y(device, filled_with_nan, function, b, T, i, o, k, dtype):
    """The strides of y and of the middle are those of a wider tensor; what lies behind them is padding."""
    y, x, A, B, weight = rows(b, T, i, o, k, dtype, device)
    z, want = beside(y, x, A, B, weight)
    got = function(z, B, weight)
    assert got.is_contiguous() and relative_rms(got, want) <= BOUND[dtype]


@EXPANDS
@pytest.mark.parametrize("k", [1, 16, 64])
def test_ranks_and_a_single_role(device, filled_with_nan, function, k):
    """Ranks below a block, of one and of many, and one adapter alone."""
    for R in (1, 2):
        y, x, A, B, weight = rows(9, 2, 33, 130, k, torch.float32, device, R)
        z, want = beside(y, x, A, B, weight)
        assert relative_rms(function(z, B, weight), want) <= 1e-5


@EXPANDS
@DTYPES
def test_without_an_adapter_y_is_the_products_own(device, function, dtype):
    """Policy and reference come from one product: a row of role 0 must keep what it gave."""
    y, x, A, B, weight = rows(7, 3, 40, 50, 16, dtype, device)
    z, _ = beside(y, x, A, B, weight)
    got, plain = function(z, B, weight), (weight == 0).all(1)
    assert plain.any() and torch.equal(got[plain], y[plain])
    assert (got != y)[~plain].any(-1).all()


def test_no_row_knows_of_another_or_of_another_role(device, program_order):
    """A middle that overflowed is another role's, or another seat's: 0 times infinity is no zero."""
    y, x, A, B, weight = rows(7, 1, 64, 48, 16, torch.bfloat16, device)
    z, _ = beside(y, x, A, B, weight)
    before = expand_triton(z, B, weight)
    z[:, :, 48:].unflatten(2, (2, 16))[weight[:, None].expand(7, 1, 2) == 0] = torch.inf
    z[4:] = torch.nan
    assert torch.equal(before[:4], expand_triton(z, B, weight)[:4])


def test_a_product_of_another_width_is_refused(device):
    """The middle of a smaller rank, or a matrix with nothing below it, would be read past its end."""
    y, x, A, B, weight = rows(3, 1, 32, 48, 12, torch.float32, device)
    z, _ = beside(y, x, A, B, weight)
    assert z.size(2) == 48 + 32
    for bad in ((z[..., :72], B, weight), (y, B, weight), (z, B[:, :4], weight), (z, B, weight[:, :1])):
        with pytest.raises(ValueError):
            expand_triton(*bad)
    with pytest.raises(ValueError, match="contiguous"):
        expand_triton(z.transpose(0, 2).contiguous().transpose(0, 2), B, weight)
