"""LoRA: one role a row in decoding, and the training layer, against float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.launch import TARGETS, pretend
from kernels.lora import lora_linear, lora_torch, lora_triton
from kernels.measure import relative_rms

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
BOTH = pytest.mark.parametrize("function", [lora_torch, lora_triton])
HALF_AND_WHOLE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def rows(b, T, i, o, k, dtype, device, R=2):
    """y, x, A, B, role, scale of a batch in which the roles 0..R take turns."""
    torch.manual_seed(0)
    y, x = torch.randn(b, T, o, device=device), torch.randn(b, T, i, device=device)
    A, B = torch.randn(R, k, i, device=device) / i**0.5, torch.randn(R, o, k, device=device)
    role = (torch.arange(b, device=device) + 1) % (R + 1)
    return *(t.to(dtype) for t in (y, x, A, B)), role, torch.arange(R, device=device) + 0.7


def truth(y, x, A, B, role, scale):
    """Row by row, in float64."""
    out = y.double()
    for b, r in enumerate(role.tolist()):
        if r:
            out[b] += scale[r - 1].double() * x[b].double() @ A[r - 1].double().T @ B[r - 1].double().T
    return out


@BOTH
@HALF_AND_WHOLE
@pytest.mark.parametrize(
    "b,T,i,o,k",
    [(1, 1, 64, 96, 48), (65, 1, 48, 100, 16), (3, 1, 1100, 33, 96), (5, 13, 40, 72, 24)],
    ids=str,
)
def test_rows_with_roles_equal_fp64(device, filled_with_nan, function, b, T, i, o, k, dtype):
    """A rank that is no power of two, a sum split over programs, a block half empty, a role mistaken."""
    args = rows(b, T, i, o, k, dtype, device)
    want = truth(*args)
    assert relative_rms(function(*args), want) <= BOUND[dtype]


@BOTH
def test_in_place_and_the_reference_untouched(device, function):
    """y is large and fresh: the update goes onto it. A row of role 0 must not change by a bit."""
    y, x, A, B, role, scale = rows(6, 1, 32, 48, 16, torch.bfloat16, device)
    before = y.clone()
    assert function(y, x, A, B, role, scale) is y
    changed = (y != before).any(-1)[:, 0]
    assert changed.tolist() == (role > 0).tolist()


def test_order_of_programs_changes_nothing(device, filled_with_nan, program_order):
    """The splits are added by the second launch, never by each other."""
    args = rows(17, 1, 1100, 70, 16, torch.float32, device)
    want = truth(*args)
    assert relative_rms(lora_triton(*args), want) <= BOUND[torch.float32]


@pytest.mark.parametrize("name", ["sm_86", "gfx942"])
def test_other_targets(device, name):
    """Fewer processors, smaller blocks: other splits of the same sum."""
    args = rows(20, 1, 1100, 40, 48, torch.bfloat16, device)
    want = truth(*args)
    with pretend(TARGETS[name]):
        assert relative_rms(lora_triton(*args), want) <= BOUND[torch.bfloat16]


def test_rows_know_nothing_of_each_other(device):
    """Another seat's tenant, even one that overflowed, must not change a row by a bit."""
    y, x, A, B, role, scale = rows(7, 1, 64, 48, 16, torch.bfloat16, device)
    before = lora_triton(y.clone(), x, A, B, role, scale)
    x[4:], y[4:] = torch.inf, torch.nan
    after = lora_triton(y.clone(), x, A, B, role, scale)
    assert torch.equal(before[:4], after[:4])


def test_bad_rows(device):
    """An adapter of another layer would be read past its end."""
    y, x, A, B, role, scale = rows(3, 1, 32, 48, 16, torch.float32, device)
    for bad in (
        (y, x, A[:, :, :16], B, role, scale),
        (y, x, A, B, role[:2], scale),
        (y, x, A, B, role, scale[:1]),
        (y, x, A.bfloat16(), B, role, scale),
        (y.transpose(0, 2).contiguous().transpose(0, 2), x, A, B, role, scale),
    ):
        with pytest.raises(ValueError):
            lora_triton(*bad)


def layer(n, i, o, k, dtype, bias):
    """x, W, bias, dy of this type, and the adapter: master copies, fp32 or wider."""
    torch.manual_seed(0)
    x, W, dy = torch.randn(n, i), torch.randn(o, i) / i**0.5, torch.randn(n, o)
    x, W, dy, b = (t.to(dtype) for t in (x, W, dy, torch.randn(o)))
    A, B = (torch.randn(k, i) / i**0.5, torch.randn(o, k) / k**0.5)
    master = torch.promote_types(dtype, torch.float32)
    return x, W, b if bias else None, A.to(master), B.to(master), dy


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("bias", [False, True])
def test_training_layer_and_its_gradients(dtype, bias):
    """A wrong transpose or a forgotten scale in the hand-written backward would train the wrong adapter."""
    x, W, b, A, B, dy = layer(37, 40, 56, 12, dtype, bias)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = lora_linear(x, W, b, A, B, 1.7)
    got = torch.autograd.grad(y, leaves, dy)
    x, A, B = wide = [t.detach().double().requires_grad_() for t in leaves]
    want_y = F.linear(x, W.double(), None if b is None else b.double()) + 1.7 * (x @ A.T) @ B.T
    want = torch.autograd.grad(want_y, wide, dy.double())
    for mine, theirs, leaf in zip((y, *got), (want_y, *want), (x.to(dtype), *leaves), strict=True):
        assert mine.dtype == leaf.dtype and relative_rms(mine, theirs) <= BOUND[dtype]


def test_training_layer_takes_any_leading_shape():
    """(B, T, i) as the model has it; and the first layer, whose input has no gradient."""
    x, W, b, A, B, _ = layer(12, 8, 16, 4, torch.float32, True)
    A.requires_grad_(), B.requires_grad_()
    y = lora_linear(x.view(3, 4, 8), W, b, A, B, 0.5)
    y.sum().backward()
    assert y.shape == (3, 4, 16) and x.grad is None and A.grad is not None


def test_training_layer_saves_only_its_input():
    """Saving each adapter's middle and output is what makes ordinary LoRA training run out of memory."""
    x, W, b, A, B, _ = layer(5, 8, 8, 2, torch.float32, True)
    y = lora_linear(x, W, b, A.requires_grad_(), B.requires_grad_(), 1.0)
    node = y.grad_fn.next_functions[0][0]  # behind the view that restores the leading dims
    assert {t.data_ptr() for t in node.saved_tensors} == {t.data_ptr() for t in (x, W, A, B)}


def test_training_layer_refuses_a_trained_base():
    """Its hand-written backward has no gradient for W: a body would not train, in silence."""
    x, W, b, A, B, _ = layer(5, 8, 8, 2, torch.float32, False)
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, W.requires_grad_(), b, A, B, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, W.detach(), b, A[:, :4], B, 1.0)
