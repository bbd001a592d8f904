"""Matrices in 8 and 4 bits: what is stored, and the products, against float64."""

import importlib

import pytest
import torch

from kernels import digits
from kernels.quantised import (
    GROUP,
    Quantised,
    gradient_torch,
    gradient_triton,
    linear,
    product_torch,
    product_triton,
)
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
BITS = pytest.mark.parametrize("bits", [8, 4])
SHAPES = [(1, 96, 64), (16, 100, 192), (37, 72, 576), (70, 200, 128), (300, 33, 64)]  # rows, outputs, inputs


def quantised(o, i, bits, device="cpu"):
    """A random matrix whose columns differ in size, quantised, and what it holds, in float64."""
    torch.manual_seed(0)
    W = torch.randn(o, i) * torch.rand(i).add(0.1) / i**0.5
    Q = Quantised.empty(o, i, bits, device)
    Q.copy_(W)
    return Q, dense(Q), W


def dense(Q):
    """The numbers that the bits stand for, one by one, as the file's head has them."""
    (o, i), q = Q.shape, Q.q.cpu().tolist()
    if Q.m is None:
        return torch.tensor(q, dtype=torch.float64) * Q.scale.cpu().double()[:, None]
    m, out = Q.m.cpu().tolist(), torch.empty(o, i, dtype=torch.float64)
    for row in range(o):
        for column in range(i):
            byte = q[row][column % (i // 2)]
            nibble = byte // 16 if column >= i // 2 else byte % 16
            out[row, column] = (nibble - 8) * m[row][column // GROUP]
    return out * Q.scale.cpu().double()[:, None]


@BITS
def test_every_number_is_near_what_it_was(bits):
    """Within half a step of 8 bits. A nibble on the wrong side, or another group's m, would be far off."""
    Q, got, W = quantised(24, 192, bits)
    assert torch.equal(Q.integers().double() * Q.scale.double()[:, None], got)
    if bits == 8:
        assert ((got - W).abs() <= Q.scale[:, None] * 0.5001).all()
    else:
        groups = W.view(24, -1, GROUP).abs().amax(2).repeat_interleave(GROUP, 1)
        coarse = groups / 8 + Q.scale[:, None] * 8  # a step of the group, and m's own rounding
        assert ((got - W).abs() <= coarse).all() and relative_rms(got, W) < 0.11
    assert Q.nbytes == 24 * 4 + 24 * 192 * bits // 8 + (24 * 192 // GROUP if bits == 4 else 0)


@BITS
def test_zeros_and_outliers(bits):
    """A row of zeros (a pruned channel) must not become NaN; one large number takes only its group along."""
    W = torch.zeros(3, 64)
    W[1, 0], W[1, 40], W[2] = 8.0, 1.0, torch.linspace(-1, 1, 64)
    Q = Quantised.empty(3, 64, bits)
    Q.copy_(W)
    got = dense(Q)
    assert (got[0] == 0).all() and got[1, 0] == pytest.approx(8) and got[1, 40] == pytest.approx(1, abs=0.1)


@BITS
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n,o,i", SHAPES, ids=str)
def test_products_equal_fp64(device, filled_with_nan, bits, dtype, n, o, i):
    """Forward with a bias, and back to the input: blocks half empty, both halves of a row, split sums. In
    fp16 a small gradient times a scale is below the smallest number."""
    Q, W, _ = quantised(o, i, bits, device)
    W, (x, dy) = W.to(device), (torch.randn(n, d, device=device) for d in (i, o))
    x, dy = x.to(dtype), (dy / 100).to(dtype)
    b = torch.randn(o, device=device).to(dtype)
    for function in (product_torch, product_triton):
        assert relative_rms(function(x, Q, b), x.double() @ W.T + b.double()) <= BOUND[dtype]
        assert relative_rms(function(x, Q), x.double() @ W.T) <= BOUND[dtype]
    for function in (gradient_torch, gradient_triton):
        assert relative_rms(function(dy, Q), dy.double() @ W) <= BOUND[dtype]


@pytest.mark.parametrize("name", ["sm_86", "gfx942"])
def test_other_targets_split_otherwise(device, pretend_to_be, name):
    """The splits of a long sum are added by the second launch; a fp32 body has smaller blocks."""
    Q, W, _ = quantised(72, 2048, 4, device)
    x = torch.randn(3, 2048, device=device)
    with pretend_to_be(name):
        assert relative_rms(product_triton(x, Q), x.double() @ W.to(device).T) <= 1e-6


@BITS
@pytest.mark.parametrize("pair", [(product_torch, gradient_torch), (product_triton, gradient_triton)])
def test_the_input_alone_gets_a_gradient(device, monkeypatch, bits, pair):
    """Triton's product is no operation that autograd knows: without ours the layers below would not train."""
    file = importlib.import_module("kernels.quantised")
    monkeypatch.setattr(file, "product", pair[0])
    monkeypatch.setattr(file, "gradient", pair[1])
    Q, W, _ = quantised(40, 64, bits, device)
    W, x = W.to(device), torch.randn(2, 5, 64, device=device, requires_grad=True)
    linear(x, Q, None).square().sum().backward()
    y = x.detach().double().requires_grad_()
    (y @ W.T).square().sum().backward()
    assert relative_rms(x.grad, y.grad) <= 1e-6


def test_wrong_shapes(device):
    """Another layer's matrix would be read past its end; groups that do not fit a row have no m."""
    Q, _, _ = quantised(40, 64, 8, device)
    for bad in (torch.randn(3, 40), torch.randn(3, 1, 64), torch.randn(3, 64, dtype=torch.float64)):
        with pytest.raises(ValueError):
            product_triton(bad.to(device), Q)
    with pytest.raises(ValueError, match="divisible by 64"):
        Quantised.empty(8, 96, 4)


# ------------------------------------------------------------------------------------------- digits, on a CPU


@pytest.fixture
def can():
    if not digits.can_pack():
        known = getattr(torch.cpu, "get_capabilities", dict)()
        assert not known.get("avx512_vnni") and not known.get("avx_vnni"), "digits are wrong, or not made"
        pytest.skip("this CPU has no exact products of 8 bits")


@BITS
@pytest.mark.parametrize("n,o,i", SHAPES, ids=str)
def test_products_in_digits_are_those_of_fp32(can, bits, n, o, i):
    """Bf16 inputs, as torch's own product of 8-bit weights has them, would be a thousand times less exact."""
    Q, W, _ = quantised(o, i, bits)
    whole = Q.integers().clone()
    Q.pack()
    assert Q.packed is not None and Q.q is None and torch.equal(Q.integers(), whole)
    x, b = torch.randn(n, i), torch.randn(o)
    x[0] = 0
    x[:, 3] *= 100  # an outlier, as real activations have them
    assert relative_rms(product_torch(x, Q, b), x.double() @ W.T + b.double()) <= 2e-6
    assert product_torch(x, Q)[0].abs().max() == 0
    assert relative_rms(gradient_torch(x @ W.float().T, Q), x.double() @ W.T @ W) <= 1e-6


def test_rows_round_alike_in_any_batch(can):
    """The engine decodes one row, the learner multiplies a thousand: `gap` is to show no difference."""
    Q, _, _ = quantised(70, 576, 8)
    Q.pack()
    x = torch.randn(600, 576)
    together = product_torch(x, Q)
    assert torch.equal(together[300:301], product_torch(x[300:301], Q))
    assert torch.equal(together[17:40], product_torch(x[17:40], Q))


def test_the_digits_are_the_number(can):
    """A carry that is lost between two digits is an error of 2^-8."""
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    d, s = digits.digits(x)
    c, b, a = d.double() - digits.ZERO
    got = (65536 * a + 256 * b + c) * s.double() / digits.UNIT
    assert ((got - x).abs() <= x.abs().amax(1, keepdim=True) * 2e-7).all()


def test_a_cpu_that_saturates_is_found_out(monkeypatch):
    """x86 before VNNI adds two products in 16 bits: 127 x 127 x 2 plus an offset is too much for it."""
    file = importlib.import_module("kernels.digits")
    monkeypatch.setattr(file, "digit_product", lambda x, packed, scale, bias: torch.full((2, 16), 8127.0))
    assert not file.can_pack.__wrapped__()
