"""RoPE's kernels against fp64, alone with their gradient, and with the cache write."""

import pytest
import torch

from kernels.measure import relative_rms
from kernels.rope import rope_cache_torch, rope_cache_triton, rope_torch, rope_triton

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


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    "B, T, H, KV, D", [(1, 1, 1, 1, 64), (2, 5, 4, 2, 96), (1, 3, 8, 1, 128), (2, 3, 14, 2, 32)]
)
def test_equals_fp64(device, program_order, B, T, H, KV, D, dtype):
    """Heads no power of two, groups of 1 to 8, halves of 48; the gradient is the inverse rotation."""
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


def test_equals_the_reference_to_the_bit(device):
    """All products round to bf16, as in Llama; keeping fp32 between them would differ from Hugging Face."""
    q, k, _ = packed(2, 4, 4, 2, 64, torch.bfloat16, device)
    cos, sin = table(4, 64, device)
    for mine, theirs in zip(rope_triton(q, k, cos, sin), rope_torch(q, k, cos, sin), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T", [1, 5])
def test_the_cache_write_equals_the_reference(device, program_order, T, dtype):
    """Tokens stand at their row's positions, padding is not written, the rest of the seat is left alone."""
    B, H, KV, D, L = 3, 4, 2, 32, 12
    q, k, v = packed(B, T, H, KV, D, dtype, device)
    cos, sin = table(9, D, device)  # the padding of the last row points past the table
    start = torch.tensor([0, 3, 7], device=device)
    lens = torch.tensor([1, 1, 1] if T == 1 else [5, 3, 2], device=device)
    whole = torch.randn(2, B, KV, 2 * L, D, device=device).to(dtype)
    mine, theirs = whole.clone(), whole.clone()
    q_mine = rope_cache_triton(q, k, v, cos, sin, *mine[:, :, :, :L], start, lens)
    q_theirs = rope_cache_torch(q, k, v, cos, sin, *theirs[:, :, :, :L], start, lens)
    real = torch.arange(T, device=device) < lens[:, None]
    assert torch.equal(q_mine[real], q_theirs[real])
    assert torch.equal(mine, theirs) and not torch.equal(mine, whole)


def test_a_full_seat_does_not_spill_into_the_next(device):
    """A token beyond the last position of its seat would overwrite the first key of the next head."""
    q, k, v = packed(2, 3, 2, 1, 32, torch.float32, device)
    cos, sin = table(16, 32, device)
    cache = torch.zeros(2, 2, 1, 4, 32, device=device)
    start, lens = torch.tensor([3, 0], device=device), torch.tensor([3, 0], device=device)
    rope_cache_triton(q, k, v, cos, sin, *cache, start, lens)
    assert (cache[:, 0, 0, 3] != 0).all() and (cache[:, 0, 0, :3] == 0).all() and (cache[:, 1] == 0).all()


def test_what_does_not_fit_is_refused(device):
    """A table shorter than the row, or a cache of other heads, would be read or written beyond its end."""
    q, k, v = packed(1, 4, 2, 1, 32, torch.float32, device)
    cos, sin = table(3, 32, device)
    with pytest.raises(ValueError):
        rope_triton(q, k, cos, sin)
    with pytest.raises(ValueError):
        cache = torch.zeros(2, 1, 2, 8, 32, device=device)
        rope_cache_triton(q, k, v, cos, sin, *cache, *torch.zeros(2, 1, dtype=torch.int64, device=device))
