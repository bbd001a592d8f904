"""Attention's kernels, forward and backward, against fp64: odd lengths, groups, head dims, padding."""

import heapq
import math

import pytest
import torch

from kernels import attention_backward
from kernels.attention import attention_torch, attention_triton, config
from kernels.launch import TARGETS
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def packed(B, T, H, KV, D, dtype, device, spread=1.0):
    """q, k and v as the model has them, views of one matrix, and a gradient of o."""
    torch.manual_seed(0)
    qkv = (torch.randn(B, T, H + 2 * KV, D, device=device) * spread).to(dtype).requires_grad_()
    return *qkv.split([H, KV, KV], 2), torch.randn(B, T, H, D, device=device).to(dtype)


def results(f, q, k, v, do, lengths):
    """o, dq, dk, dv of f."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = f(q, k, v, lengths)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def truth(q, k, v, do, lengths):
    return results(attention_torch, *(x.detach().double() for x in (q, k, v, do)), lengths)


def agree(mine, theirs, bound):
    """Within the bound of fp64, all four. A gradient that is zero in truth (T = 1) must be nearly so."""
    for x, y in zip(mine, theirs, strict=True):
        assert x.shape == y.shape
        none = y.abs().max() < 1e-12
        assert (x.abs().max() if none else relative_rms(x, y)) <= bound


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "B, T, H, KV, D",
    [
        (1, 1, 2, 1, 64),
        (2, 63, 2, 2, 32),
        (1, 65, 2, 1, 64),
        (1, 111, 8, 1, 128),
        (1, 111, 3, 1, 96),
        (2, 37, 3, 1, 40),
    ],
)
def test_equals_fp64(device, B, T, H, KV, D, dtype):
    """Lengths that no block divides; groups of 1, 2, 3 and 8; head dims of 32 to 128, also 40 and 96."""
    inputs = packed(B, T, H, KV, D, dtype, device)
    agree(results(attention_triton, *inputs, None), truth(*inputs, None), BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_rows_of_any_length(device, program_order, dtype):
    """Empty, one token, at a block's edge, full: padding gives zeros and zero gradients, in any order."""
    T, lengths = 147, torch.tensor([0, 1, 128, 129, 147], device=device)
    inputs = packed(5, T, 2, 1, 32, dtype, device)
    mine = results(attention_triton, *inputs, lengths)
    agree(mine, truth(*inputs, lengths), BOUND[dtype])
    padding = torch.arange(T, device=device) >= lengths[:, None]
    assert all((x[padding] == 0).all() for x in mine)


@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_padding_and_other_rows_change_nothing(device, poison):
    """Whatever stands in the padding, and in another row, a row's o and gradients keep every bit."""
    q, k, v, do = packed(2, 140, 2, 1, 64, torch.bfloat16, device)
    lengths = torch.tensor([131, 70], device=device)
    before = results(attention_triton, q, k, v, do, lengths)
    q, k, v, do = (x.detach().clone() for x in (q, k, v, do))
    for x in (q, k, v, do):
        x[0, 131:] = poison
        x[1] = poison
    for x, y in zip(before, results(attention_triton, q, k, v, do, lengths), strict=True):
        assert torch.equal(x[0], y[0])


def test_a_token_sees_nothing_after_it(device):
    """Changing token 65 leaves the outputs before it as they were, to the bit, and changes its own."""
    q, k, v, _ = (x.detach() for x in packed(1, 130, 2, 2, 64, torch.bfloat16, device))
    before = attention_triton(q, k, v)
    for x in (k, v):
        x[:, 65] += 1
    after = attention_triton(q, k, v)
    assert torch.equal(before[:, :65], after[:, :65]) and not torch.equal(before[:, 65], after[:, 65])


def test_sharp_softmax(device):
    """Scores in the hundreds, where 2^x alone would overflow: the running maximum keeps all four right.

    The bound follows from fp32: rounding a number of size X errs by at most X 2^-24. A score in base 2 and
    what is subtracted from it are rounded D + 4 times (D sums, scaling, lse, two differences); independent
    errors add up as sqrt(D + 4). 2^x turns an error e of x into a relative error e ln 2 of p, hence of o and
    the gradients. X is the root mean square of the scores, weighted by p. The order in which a BLAS sums
    decides how much of the bound is seen: a twentieth with its kernels for AVX-512, a quarter with AVX2's.
    """
    D = 64
    inputs = packed(1, 100, 2, 1, D, torch.float32, device, spread=8.0)
    q, k = (x[0].detach().double() for x in inputs[:2])
    z = torch.einsum("thd,skd->hts", q, k) / D**0.5  # (H, T, T)
    p = z.masked_fill(torch.ones_like(z).triu(1).bool(), -torch.inf).softmax(-1)
    X = (p * z.square()).sum(-1).mean().sqrt().item() / math.log(2)
    bound = 2**-24 * X * math.sqrt(D + 4) * math.log(2)
    agree(results(attention_triton, *inputs, None), truth(*inputs, None), bound)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_choice_of_blocks(device, pretend_to_be, target, dtype):
    """The blocks chosen for each GPU give the same result here; D = 128 has blocks of its own."""
    with pretend_to_be(target):
        for D in (32, 128) if dtype == torch.bfloat16 else (32,):
            inputs = packed(1, 129, 2, 1, D, dtype, device)
            agree(results(attention_triton, *inputs, None), truth(*inputs, None), BOUND[dtype])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("D", [32, 64, 96, 128])
def test_blocks_divide_as_the_loops_assume(D, wide, target):
    """The first masked block starts on the diagonal only if BN divides BM (in dk, dv: the reverse)."""
    t = TARGETS[target]
    for c in (config(D, wide, t), attention_backward.config_dq(D, wide, t)):
        assert c["BM"] % c["BN"] == 0
    c = attention_backward.config_dk_dv(D, wide, t)
    assert c["BN"] % c["BM"] == 0


@pytest.mark.parametrize("processors, heads", [(1, 4), (3, 2), (4, 2), (132, 1)])
def test_a_group_in_parts(device, monkeypatch, processors, heads):
    """Whole groups where programs abound, else parts of them: a head left out, or summed twice, would
    train on a wrong gradient."""
    few = TARGETS["sm_90"]._replace(processors=processors)
    monkeypatch.setattr(attention_backward, "target", lambda: few)
    assert attention_backward.heads_of_a_part(4, 3, few) == heads
    inputs = packed(1, 70, 4, 1, 32, torch.float32, device)
    agree(results(attention_triton, *inputs, None), truth(*inputs, None), BOUND[torch.float32])


def test_parts_fill_the_processors():
    """128 programs of a causal backward pass, the longest of 16 blocks, kept 132 processors half busy."""
    card, KV, G, B, blocks = TARGETS["sm_90"], 2, 8, 4, 16

    def used(heads):
        free = [0.0] * card.processors
        for n in range(blocks, 0, -1):  # each goes to the processor that is free first
            for _ in range(KV * B * G // heads):
                heapq.heapreplace(free, free[0] + n * heads)
        return sum(free) / card.processors / max(free)

    assert used(G) < 0.55
    assert used(attention_backward.heads_of_a_part(G, KV * B * blocks, card)) > 0.95


def test_twice_the_same_bits(device):
    """No atomics: two runs give identical gradients."""
    inputs = packed(2, 70, 4, 1, 64, torch.bfloat16, device)
    for x, y in zip(*(results(attention_triton, *inputs, None) for _ in range(2)), strict=True):
        assert torch.equal(x, y)


def test_an_expanded_gradient(device):
    """o.sum() hands the backward pass a gradient whose strides are all zero."""
    q, k, v, _ = (x.detach().requires_grad_() for x in packed(1, 20, 2, 1, 32, torch.float32, device))
    mine = torch.autograd.grad(attention_triton(q, k, v).sum(), (q, k, v))
    theirs = torch.autograd.grad(attention_torch(q, k, v).sum(), (q, k, v))
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda q, k, v: (q, k[:, :-1], v), "do not fit"),
        (lambda q, k, v: (q[:, :, :3], k, v), "multiple"),
        (lambda q, k, v: (q, k, v.bfloat16()), "all bf16, fp16 or fp32"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "all bf16, fp16 or fp32"),
        (lambda q, k, v: (q[..., :20], k[..., :20], v[..., :20]), "head_dim 20"),
        (lambda q, k, v: (q, k.transpose(1, 3).contiguous().transpose(1, 3), v), "contiguous"),
    ],
)
def test_bad_input_is_named(device, change, complaint):
    """Each would otherwise read the wrong memory, and say nothing."""
    q, k, v = (torch.zeros(1, 5, n, 32, device=device) for n in (4, 2, 2))
    with pytest.raises(ValueError, match=complaint):
        attention_triton(*change(q, k, v))
    with pytest.raises(ValueError, match="lengths"):
        attention_triton(q, k, v, torch.zeros(3, dtype=torch.int64, device=device))
