"""RMSNorm's kernel against fp64, forward and backward, with and without the residual."""

import pytest
import torch

from kernels.rms_norm import rms_norm_torch, rms_norm_triton
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def inputs(shape, dtype, device):
    torch.manual_seed(0)
    x, r, dy, ds = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    return x, r, dy, ds, torch.randn(shape[-1], device=device).to(dtype)


def double(*tensors):
    return [t.double().requires_grad_() for t in tensors]


def check(shape, dtype, device):
    """With a residual, both directions, against fp64."""
    x, r, dy, ds, w = inputs(shape, dtype, device)
    x64, r64, w64 = double(x, r, w)
    truth = rms_norm_torch(x64, w64, 1e-6, r64)
    grads = torch.autograd.grad(truth, (x64, r64), (dy.double(), ds.double()))
    x.requires_grad_(), r.requires_grad_()
    out = rms_norm_triton(x, w, 1e-6, r)
    mine = torch.autograd.grad(out, (x, r), (dy, ds))
    for a, b in zip((*out, *mine), (*truth, *grads), strict=True):
        assert a.dtype == dtype and relative_rms(a, b) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", [(1, 1, 63), (3, 21, 65), (7, 111), (2, 897)], ids=str)
def test_with_residual_equals_fp64(device, shape, dtype):
    """An odd width or a last block of rows handled wrongly, or a gradient that misses one of two ways in."""
    check(shape, dtype, device)


def test_order_of_programs_changes_nothing(device, program_order):
    """A program that wrote a neighbour's rows would show in one order or another."""
    check((70, 111), torch.bfloat16, device)


@pytest.mark.parametrize("dtype", BOUND)
def test_without_residual_equals_fp64(device, dtype):
    """The first norm has no residual; its weight has a gradient only where the body is trained."""
    x, _, dy, _, w = inputs((5, 131), dtype, device)
    x64, w64 = double(x, w)
    truth = rms_norm_torch(x64, w64, 1e-5)
    grads = torch.autograd.grad(truth, (x64, w64), dy.double())
    x.requires_grad_(), w.requires_grad_()
    y = rms_norm_triton(x, w, 1e-5)
    for a, b in zip((y, *torch.autograd.grad(y, (x, w), dy)), (truth, *grads), strict=True):
        assert relative_rms(a, b) <= BOUND[dtype]


def test_rounds_as_the_reference_does(device):
    """Scaling before the cast would differ from Llama's in a third of the elements, and show as drift."""
    x, r, _, _, w = inputs((16, 256), torch.bfloat16, device)
    for mine, theirs in zip(rms_norm_triton(x, w, 1e-6, r), rms_norm_torch(x, w, 1e-6, r), strict=True):
        assert (mine != theirs).float().mean() < 0.002


def test_only_one_of_two_gradients_arrives(device):
    """In the last norm of a model nobody uses the sum: its gradient is absent, not zero."""
    x, r, dy, ds, w = inputs((3, 64), torch.float32, device)
    x.requires_grad_()
    y, s = rms_norm_triton(x, w, 1e-6, r)
    (from_y,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (from_s,) = torch.autograd.grad(s, x, ds, retain_graph=True)
    (both,) = torch.autograd.grad((y, s), x, (dy, ds))
    assert torch.equal(from_s, ds) and relative_rms(from_y + from_s, both) < 1e-6


def test_without_gradients_the_same_bits(device):
    """In decoding the wrapper leaves autograd out: it must not leave out more."""
    x, r = torch.randn(2, 5, 40, device=device)
    w = torch.randn(40, device=device)
    with torch.no_grad():
        got = rms_norm_triton(x, w, 1e-6, r), (rms_norm_triton(x, w, 1e-6),)
    want = rms_norm_triton(x, w, 1e-6, r), (rms_norm_triton(x, w, 1e-6),)
    assert all(torch.equal(a, b) for g, one in zip(got, want) for a, b in zip(g, one, strict=True))


def test_another_row_changes_nothing(device):
    """Rows share a program when they are short: what one holds must not reach the next."""
    x, _, _, _, w = inputs((9, 64), torch.float32, device)
    before = rms_norm_triton(x, w, 1e-6)
    x[4] = float("nan")
    after = rms_norm_triton(x, w, 1e-6)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(before[others], after[others]) and after[4].isnan().all()


def test_heads_as_rows(device):
    """Qwen3 normalises each head of a packed matrix: a view whose rows are not neighbours."""
    packed = torch.randn(2, 3, 6, 32, device=device)
    q, w = packed[:, :, :4], torch.randn(32, device=device)
    assert relative_rms(rms_norm_triton(q, w, 1e-6), rms_norm_torch(q, w, 1e-6)) < 1e-6


@pytest.mark.parametrize(
    "x, w, r",
    [((2, 8), (9,), None), ((2, 8), (8,), (3, 8)), ((1, 32768), (32768,), None)],
    ids=["weight", "residual", "long"],
)
def test_what_does_not_fit_is_refused(device, x, w, r):
    """A wrong shape would read beyond a tensor."""
    x, w, r = (None if s is None else torch.ones(s, device=device) for s in (x, w, r))
    with pytest.raises(ValueError):
        rms_norm_triton(x, w, 1e-6, r)
