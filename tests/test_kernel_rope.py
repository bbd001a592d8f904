"""RoPE's kernel and its gradient, against fp64."""

import pytest
import torch

from kernels.rope import rope_torch, rope_triton
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def table(positions, D, device):
    angle = torch.arange(positions)[:, None] * 100.0 ** -torch.linspace(0, 1, D // 2)
    return angle.cos().to(device), angle.sin().to(device)


def packed(B, T, H, KV, D, dtype, device):
    """q, k and v as the model has them: views of one matrix."""
    torch.manual_seed(0)
    return torch.randn(B, T, H + 2 * KV, D, device=device).to(dtype).split([H, KV, KV], 2)


def fp64(f, q, k, cos, sin):
    """The reference in fp64, with cos and sin rounded as the type of q asks."""
    return f(q.double(), k.double(), cos.to(q.dtype).double(), sin.to(q.dtype).double())


def check(B, T, H, KV, D, dtype, device):
    """Both directions against fp64; the gradient is the inverse rotation."""
    q, k, _ = packed(B, T, H, KV, D, dtype, device)
    cos, sin = table(T + 2, D, device)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = rope_triton(q, k, cos, sin)
    for mine, truth in zip(out, fp64(rope_torch, q, k, cos, sin), strict=True):
        assert mine.dtype == dtype and relative_rms(mine, truth) <= BOUND[dtype]
    dq, dk = (torch.randn_like(x) for x in out)
    back = torch.autograd.grad(out, (q, k), (dq, dk))
    for mine, truth in zip(back, fp64(rope_torch, dq, dk, cos, -sin), strict=True):
        assert relative_rms(mine, truth) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    "B, T, H, KV, D",
    [
        (1, 1, 1, 1, 64),
        (1, 63, 4, 2, 96),
        (1, 65, 8, 1, 128),
        (1, 111, 2, 2, 32),
        (2, 3, 14, 2, 64),
        (2, 7, 3, 3, 10),
    ],
)
def test_equals_fp64(device, B, T, H, KV, D, dtype):
    """Odd lengths, heads no power of two, groups of 1 to 8, halves of 5 and 48."""
    check(B, T, H, KV, D, dtype, device)


def test_order_of_programs_changes_nothing(device, program_order):
    """A token that another's program wrote, or read back, would show in one order or another."""
    check(2, 4, 4, 2, 32, torch.bfloat16, device)


def test_equals_the_reference_to_the_bit(device):
    """All products round to bf16, as in Llama; keeping fp32 between them would differ from Hugging Face."""
    q, k, _ = packed(2, 4, 4, 2, 64, torch.bfloat16, device)
    cos, sin = table(4, 64, device)
    for mine, theirs in zip(rope_triton(q, k, cos, sin), rope_torch(q, k, cos, sin), strict=True):
        assert torch.equal(mine, theirs)


def test_another_token_changes_nothing(device):
    """Each token is a program's own: what another holds, even NaN, must not reach it."""
    q, k, _ = packed(2, 4, 2, 1, 32, torch.float32, device)
    cos, sin = table(4, 32, device)
    before = rope_triton(q, k, cos, sin)
    q, k = q.clone(), k.clone()
    q[0, 1], k[1] = torch.nan, torch.nan
    after = rope_triton(q, k, cos, sin)
    assert torch.equal(before[0][1], after[0][1]) and torch.equal(before[0][0, 2:], after[0][0, 2:])
    assert torch.equal(before[1][0], after[1][0]) and after[1][1].isnan().all()


def test_what_does_not_fit_is_refused(device):
    """A table shorter than the row, or of other heads, would be read beyond its end."""
    q, k, _ = packed(1, 4, 2, 1, 32, torch.float32, device)
    for positions, D in ((3, 32), (4, 64)):
        with pytest.raises(ValueError):
            rope_triton(q, k, *table(positions, D, device))
