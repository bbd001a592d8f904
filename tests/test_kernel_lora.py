"""LoRA: the training layer against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.lora import lora_linear


def rel(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def layer(n, i, o, k, dtype, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    x, W, b = r(n, i), r(o, i) / i**0.5, r(o) if bias else None
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    return cast(x), cast(W), cast(b), (r(k, i) / i**0.5).float(), (r(o, k) / k**0.5).float(), cast(r(n, o))


@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("bias", [False, True])
def test_training_layer_and_its_gradients(dtype, tol, bias):
    """A wrong transpose or a forgotten scale in the hand-written backward would train the wrong adapter in silence."""
    x, W, b, A, B, dy = layer(37, 40, 56, 12, dtype, bias)
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    y = lora_linear(x, W, b, A, B, 1.7)
    y.backward(dy)
    x64, A64, B64 = (t.detach().double().requires_grad_() for t in (x, A, B))
    want = F.linear(x64, W.double(), None if b is None else b.double()) + 1.7 * (x64 @ A64.T) @ B64.T
    want.backward(dy.double())
    assert rel(y, want) < tol
    for got, ref in ((x, x64), (A, A64), (B, B64)):
        assert got.grad.dtype == got.dtype and rel(got.grad, ref.grad) < tol


def test_training_layer_saves_only_its_input():
    """Saving the middle or the output of every adapter is what makes ordinary LoRA training run out of memory."""
    x, W, b, A, B, _ = layer(5, 8, 8, 2, torch.float32, True)
    y = lora_linear(x, W, b, A.requires_grad_(), B.requires_grad_(), 1.0)
    node = y.grad_fn.next_functions[0][0]  # behind the view that restores the leading dims
    assert {t.data_ptr() for t in node.saved_tensors} == {t.data_ptr() for t in (x, W, A, B)}
