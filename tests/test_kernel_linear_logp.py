"""Log-probabilities from hidden states and a frozen head, against float64: the reference and the kernels."""

from importlib import import_module

import pytest
import torch

from kernels import linear_logp_backward, logits_tile
from kernels.linear_logp import linear_logp_torch, linear_logp_triton
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # of the gradient
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def case(n, v, d, dtype, device="cpu"):
    """h (n, d), W (v, d), targets (n,), and the gradients that come in, (n,) each."""
    torch.manual_seed(0)
    h, W = torch.randn(n, d, device=device), torch.randn(v, d, device=device) * 3 / d**0.5
    targets = torch.randint(v, (n,), device=device)
    targets[0], targets[-1] = v - 1, 0  # both ends of the vocabulary
    return h.to(dtype), W.to(dtype), targets, *torch.randn(2, n, device=device)


def truth(h, W, targets, tau):
    """In the type of h, by autograd, through the whole (N, V)."""
    p = (h @ W.T / tau).log_softmax(-1)
    return p.gather(1, targets[:, None])[:, 0], -(p.exp() * p).sum(-1)


def with_gradient(function, h, W, targets, dlogp, dentropy, tau):
    """log-probs, entropies, and the gradient for h; either incoming gradient may be None."""
    h = h.detach().requires_grad_()
    out = function(h, W, targets, tau)
    pairs = [(o, g) for o, g in zip(out, (dlogp, dentropy), strict=True) if g is not None]
    outputs, incoming = zip(*pairs, strict=True)
    return *(o.detach() for o in out), torch.autograd.grad(outputs, h, incoming)[0]


def compare(function, h, W, targets, dlogp, dentropy, tau, logp_bound=1e-6):
    mine = with_gradient(function, h, W, targets, dlogp, dentropy, tau)
    wide = [None if g is None else g.double() for g in (dlogp, dentropy)]
    want = with_gradient(truth, h.double(), W.double(), targets, *wide, tau)
    for a, b, bound in zip(mine, want, (logp_bound, logp_bound, BOUND[h.dtype]), strict=True):
        assert relative_rms(a, b) <= bound


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n", [1, 63, 65])
def test_reference_equals_fp64(n, dtype):
    """The reference is what a CPU trains with: it must be exact itself, over several chunks. Logits that are
    rounded to bf16 make the log-probs wrong by 1e-3, and the gradient by 8e-3.
    """
    compare(linear_logp_torch, *case(3 * n, 9001, 48, dtype), tau=0.7)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("n,v,d", [(1, 130, 64), (63, 129, 96), (65, 300, 48), (111, 71, 33), (5, 1111, 13)])
def test_kernel_equals_fp64(device, n, v, d, dtype):
    """A word beyond the vocabulary in the sum, partials merged wrongly, a target in the wrong stripe."""
    compare(linear_logp_triton, *case(n, v, d, dtype, device), tau=1.3)


@pytest.mark.parametrize("name", ["sm_80", "sm_100"])
def test_every_tile_of_the_halves(device, pretend_to_be, name):
    """The other tile sizes that a GPU may choose: they fall into stripes differently."""
    with pretend_to_be(name):
        compare(linear_logp_triton, *case(3, 301, 77, torch.bfloat16, device), tau=1.0)


def test_order_of_programs_changes_nothing(device, program_order):
    """A race between the stripes of a row would be seen as a result that depends on who comes first."""
    compare(linear_logp_triton, *case(66, 201, 35, torch.float32, device), tau=1.0)


@pytest.mark.parametrize("function", [linear_logp_torch, linear_logp_triton])
def test_one_gradient_alone(device, function):
    """The loss may use the log-prob without the entropy, or a bonus the entropy alone."""
    h, W, targets, dlogp, dentropy = case(7, 100, 32, torch.float32, device)
    compare(function, h, W, targets, dlogp, None, 1.0)
    compare(function, h, W, targets, None, dentropy, 1.0)


def test_backward_in_bounded_pieces(device, monkeypatch):
    """The buffer of dz holds some rows only: a piece that overwrote another's gradient would show here."""
    monkeypatch.setattr(linear_logp_backward, "BUFFER", 1)
    # `kernels.linear_logp` itself is the function
    monkeypatch.setattr(import_module("kernels.linear_logp"), "STRIPED", 64)
    compare(linear_logp_triton, *case(150, 70, 32, torch.float32, device), tau=1.0)


def test_the_reference_in_tiles(device, monkeypatch):
    """Words in several tiles, the last of them narrow: another tile's maximum or target must not be lost."""
    monkeypatch.setattr(logits_tile, "WORDS", 32)
    monkeypatch.setattr(logits_tile, "TILE", 32 * 40)
    compare(linear_logp_torch, *case(150, 70, 32, torch.float32, device), tau=0.7)


def test_extreme_logits_stay_finite(device):
    """Logits of hundreds overflow an exponential without the maximum; a sure word has entropy 0, not NaN."""
    h, W, targets, dlogp, dentropy = case(3, 150, 32, torch.float32, device)
    targets[:] = (h @ W.T).argmax(-1)
    for out in with_gradient(linear_logp_triton, h * 300, W, targets, dlogp, dentropy, 1.0):
        assert out.isfinite().all() and out.abs().max() < 1e-3


def test_rows_know_nothing_of_each_other(device):
    """A row's log-prob and gradient must not change by a bit when its neighbours do."""
    h, W, targets, dlogp, dentropy = case(9, 150, 32, torch.bfloat16, device)
    before = with_gradient(linear_logp_triton, h, W, targets, dlogp, dentropy, 1.0)
    h[5:], targets[5:], dlogp[5:] = 7, 3, 9
    after = with_gradient(linear_logp_triton, h, W, targets, dlogp, dentropy, 1.0)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:5], b[:5])


@pytest.mark.parametrize("function", [linear_logp_torch, linear_logp_triton])
def test_no_tokens(device, function):
    """A micro-batch in which the policy wrote nothing."""
    h, W, targets, *_ = case(2, 50, 32, torch.float32, device)
    logp, entropy = function(h[:0].requires_grad_(), W, targets[:0])
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()


def test_bad_input(device):
    """Mixed types would be multiplied in silence on one device and refused on the other."""
    h, W, targets, *_ = case(2, 50, 32, torch.float32, device)
    for bad in (
        (h, W.bfloat16(), targets),
        (h, W.T, targets),
        (h, W, targets[:1]),
        (h.double(), W.double(), targets),
    ):
        with pytest.raises(ValueError):
            linear_logp_triton(*bad)
