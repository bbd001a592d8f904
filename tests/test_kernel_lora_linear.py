"""The training layer with its adapter, and its hand-written gradients, against float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.lora_linear import lora_linear
from kernels.tools.measure import relative_rms

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}


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
    x, W, b, A, B, dy = layer(37, 41, 53, 11, dtype, bias)
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
    assert {t.data_ptr() for t in node.saved_tensors} == {t.data_ptr() for t in (x, A, B)}


def test_training_layer_refuses_a_trained_base():
    """Its hand-written backward has no gradient for W: a body would not train, in silence."""
    x, W, b, A, B, _ = layer(5, 8, 8, 2, torch.float32, False)
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, W.requires_grad_(), b, A, B, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, W.detach(), b, A[:, :4], B, 1.0)
