"""SwiGLU's kernel against fp64, forward and backward."""

import pytest
import torch

from kernels.swiglu import swiglu_torch, swiglu_triton
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def check(shape, dtype, device):
    """Both directions against fp64."""
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype).requires_grad_()
    dy = torch.randn(shape, device=device).to(dtype)
    x64 = x.detach().double().requires_grad_()
    truth = swiglu_torch(x64)
    y = swiglu_triton(x)
    (dx,), (dx64,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(truth, x64, dy.double())
    assert y.shape == shape and relative_rms(y, truth) <= BOUND[dtype]
    assert relative_rms(dx, dx64) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", [(1, 1, 63), (3, 21, 65), (5, 111), (1, 1501)], ids=str)
def test_equals_fp64(device, shape, dtype):
    """An odd width, or a second block of columns, handled wrongly; a wrong sign in the gate's gradient."""
    check(shape, dtype, device)


def test_order_of_programs_changes_nothing(device, program_order):
    """A program that wrote a neighbour's columns would show in one order or another."""
    check((2, 1101), torch.bfloat16, device)


def test_another_row_changes_nothing(device):
    """Whatever another row holds, even NaN, a row keeps every bit."""
    x = torch.randn(3, 130, device=device).bfloat16()
    before = swiglu_triton(x)
    x[1] = torch.nan
    after = swiglu_triton(x)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and after[1].isnan().all()


def test_rounds_as_the_reference_does(device):
    """Torch casts silu(g) before the product; not doing so would show as drift from Hugging Face."""
    x = torch.randn(16, 256, device=device).bfloat16()
    assert (swiglu_triton(x) != swiglu_torch(x)).float().mean() < 0.002


def test_large_gates_saturate(device):
    """exp(-g) overflows for very negative gates: the limit is 0, not NaN."""
    x = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1.0, 1.0, 1.0, 1.0]], device=device, requires_grad=True)
    y = swiglu_triton(x)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([[0.0, 0.0, 0.0, 200.0]], device=device))
    assert x.grad.isfinite().all()


def test_an_odd_width_is_refused(device):
    """There would be no telling the gate from the value."""
    with pytest.raises(ValueError):
        swiglu_triton(torch.ones(2, 7, device=device))
