"""Sampling: the distribution, the log-probs, greedy, and the same word for the same u on every device."""

import pytest
import torch

from kernels.sample import sample_torch, sample_triton

BOTH = pytest.mark.parametrize("function", [sample_torch, sample_triton])
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def case(b, v, dtype, device):
    torch.manual_seed(0)
    logits = (3 * torch.randn(b, v, device=device)).to(dtype)
    return logits, torch.rand(b, dtype=torch.float64, device=device), torch.ones(b, device=device)


def tempered(logits, tau):
    return (logits.double() / torch.where(tau == 0, 1, tau)[:, None]).log_softmax(-1)


def assert_inverse_cdf(ids, logp, logits, u, tau, slack=1e-6):
    """u lies in the interval of the word, up to rounding, and the log-prob is the word's."""
    p = tempered(logits, tau)
    above = p.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
    mine = p.gather(1, ids[:, None])[:, 0]
    assert (above - mine.exp() - slack <= u).all() and (u <= above + slack).all()
    assert ids.dtype == torch.int64 and logp.dtype == torch.float32
    assert (logp - mine).abs().max() <= 2e-6


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b,v", [(1, 63), (5, 111), (3, 4097), (2, 9001)])
def test_inverse_of_the_cdf(device, function, b, v, dtype):
    """A stripe or a word left out of the sum, or the interval of the word's neighbour."""
    logits, u, tau = case(b, v, dtype, device)
    tau += torch.arange(b, device=device) / 3
    assert_inverse_cdf(*function(logits, u, tau), logits, u, tau)


@BOTH
def test_ends_of_the_interval(device, function):
    """u = 0 must not pick a word without mass at the start, nor u = 1 - 2^-53 (1 in fp32) one behind."""
    logits, u, tau = case(4, 600, torch.float32, device)
    logits[:, :300] = -torch.inf
    logits[:, 500:] = -torch.inf
    u[:2], u[2:] = 0.0, 1 - 2**-53
    ids, logp = function(logits, u, tau)
    assert ids.tolist() == [300, 300, 499, 499] and logp.isfinite().all()


@BOTH
def test_greedy_takes_the_first_of_equals(device, function):
    """tau = 0 in some rows of a batch; ties as argmax breaks them; the log-prob is that of temperature 1."""
    logits, u, tau = case(6, 5000, torch.bfloat16, device)
    logits[0, [700, 4999]], logits[1, [3, 4]], logits[2, [4095, 4096]] = 30.0, 30.0, 30.0
    tau[:4], tau[4] = 0.0, 0.3
    ids, logp = function(logits, u, tau)
    assert ids[:4].tolist() == logits.float().argmax(-1)[:4].tolist() and ids[:3].tolist() == [700, 3, 4095]
    assert (logp - tempered(logits, tau).gather(1, ids[:, None])[:, 0]).abs().max() <= 2e-6
    assert_inverse_cdf(ids[4:], logp[4:], logits[4:], u[4:], tau[4:])


@BOTH
def test_frequencies(device, function):
    """The distribution sampled is the one that is trained: a bias would not be seen in single draws."""
    n = 4000 if function is sample_torch else 64
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]], device=device)
    u = (torch.arange(n, device=device) + 0.5) / n
    ids, _ = function(logits.expand(n, -1), u, torch.full((n,), 0.8, device=device))
    share = torch.bincount(ids, minlength=5) / n
    assert (share - (logits[0] / 0.8).softmax(-1)).abs().max() <= 1 / n


def test_same_word_on_both_devices(device):
    """Runs are compared across devices: the same u must give the same word but for a tie within rounding."""
    logits, u, tau = case(16, 700, torch.float32, device)
    assert torch.equal(sample_triton(logits, u, tau)[0], sample_torch(logits, u, tau)[0])


def test_order_of_programs_changes_nothing(device, program_order):
    """The second launch reads what the stripes left: none may be missing, whoever ran first."""
    logits, u, tau = case(3, 8200, torch.float32, device)
    assert_inverse_cdf(*sample_triton(logits, u, tau), logits, u, tau)


def test_a_row_of_a_larger_tensor(device):
    """The last position of prefilled logits is a view with a row stride; nothing else of it may be read."""
    whole = torch.full((3, 4, 130), torch.nan, device=device)
    whole[:, -1] = case(3, 130, torch.float32, device)[0]
    _, u, tau = case(3, 130, torch.float32, device)
    assert_inverse_cdf(*sample_triton(whole[:, -1], u, tau), whole[:, -1], u, tau)


def test_bad_input(device):
    """A missing temperature would be read from whatever lies behind."""
    logits, u, tau = case(3, 130, torch.float32, device)
    for bad in ((logits, u, tau[:2]), (logits, u[:1], tau), (logits.T.contiguous().T, u, tau)):
        with pytest.raises(ValueError):
            sample_triton(*bad)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("v", [300, 5000])
def test_logits_that_are_not_finite_choose_a_word_without_log_prob(device, function, bad, v):
    """After an overflow in fp16: an id beyond the vocabulary would read beyond the embedding, on a GPU in
    silence. The engine sees that the log-prob is not finite."""
    logits, u, tau = case(4, v, torch.float32, device)
    logits[0], logits[1, 7], tau[2] = bad, bad, 0.0
    logits[2] = bad
    ids, logp = function(logits, u, tau)
    assert (ids >= 0).all() and (ids < v).all() and not logp[:3].isfinite().any() and logp[3].isfinite()
