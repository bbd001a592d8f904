"""RoPE with the cache write, against the reference to the bit: positions, padding, the edges of a seat."""

import pytest
import torch
from test_kernel_rope import BOUND, fp64, packed, table

from kernels.measure import relative_rms
from kernels.place import Place
from kernels.rope import rope_torch
from kernels.rope_cache import rope_cache_torch, rope_cache_triton

pytestmark = pytest.mark.usefixtures("filled_with_nan")


def place(q, cos, sin, start, lens):
    return Place(start, q.size(1), 0, lens, cos, sin, q.dtype)


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
    q_mine = rope_cache_triton(q, k, v, *mine[:, :, :, :L], place(q, cos, sin, start, lens))
    q_theirs = rope_cache_torch(q, k, v, *theirs[:, :, :, :L], place(q, cos, sin, start, lens))
    real = torch.arange(T, device=device) < lens[:, None]
    assert torch.equal(q_mine[real], q_theirs[real])
    assert torch.equal(mine, theirs) and not torch.equal(mine, whole)


def test_a_full_seat_does_not_spill_into_the_next(device):
    """A token beyond the last position of its seat would overwrite the first key of the next head."""
    q, k, v = packed(2, 3, 2, 1, 32, torch.float32, device)
    cos, sin = table(16, 32, device)
    cache = torch.zeros(2, 2, 1, 4, 32, device=device)
    start, lens = torch.tensor([3, 0], device=device), torch.tensor([3, 0], device=device)
    rope_cache_triton(q, k, v, *cache, place(q, cos, sin, start, lens))
    assert (cache[:, 0, 0, 3] != 0).all() and (cache[:, 0, 0, :3] == 0).all() and (cache[:, 1] == 0).all()


@pytest.mark.parametrize("H, KV, D", [(8, 1, 128), (6, 3, 96), (2, 2, 64)])
@pytest.mark.parametrize("dtype", BOUND)
def test_equals_fp64(device, H, KV, D, dtype):
    """All head dims and groups: what stands in the cache is the rotated key, and the value as it came."""
    q, k, v = packed(1, 3, H, KV, D, dtype, device)
    cos, sin = table(3, D, device)
    cache = torch.zeros(2, 1, KV, 4, D, device=device, dtype=dtype)
    start, lens = torch.tensor([0], device=device), torch.tensor([3], device=device)
    mine = rope_cache_triton(q, k, v, *cache, place(q, cos, sin, start, lens))
    q64, k64 = fp64(rope_torch, q, k, cos, sin)
    assert relative_rms(mine, q64) <= BOUND[dtype]
    assert relative_rms(cache[0, :, :, :3], k64.transpose(1, 2)) <= BOUND[dtype]
    assert torch.equal(cache[1, :, :, :3], v.transpose(1, 2)) and (cache[:, :, :, 3] == 0).all()


def test_other_rows_change_nothing(device):
    """Another row's tokens and padding, even NaN, reach neither this row's q nor its seat."""
    q, k, v = (x.clone() for x in packed(2, 3, 2, 1, 32, torch.float32, device))
    cos, sin = table(8, 32, device)
    start, lens = torch.tensor([2, 0], device=device), torch.tensor([2, 3], device=device)
    cache = torch.zeros(2, 2, 2, 1, 8, 32, device=device)  # before and after
    before = rope_cache_triton(q, k, v, *cache[0], place(q, cos, sin, start, lens))
    for x in (q, k, v):
        x[0, 2], x[1] = torch.nan, torch.nan
    after = rope_cache_triton(q, k, v, *cache[1], place(q, cos, sin, start, lens))
    assert torch.equal(before[0, :2], after[0, :2]) and torch.equal(cache[0, :, 0], cache[1, :, 0])


def test_what_does_not_fit_is_refused(device):
    """A cache of other heads, or whose halves are laid out differently, would be written beyond its end."""
    q, k, v = packed(1, 4, 2, 1, 32, torch.float32, device)
    cos, sin = table(4, 32, device)
    rows = torch.zeros(2, 1, dtype=torch.int64, device=device)
    cache = torch.zeros(2, 1, 1, 8, 32, device=device)
    for k_cache, v_cache in (
        torch.zeros(2, 1, 2, 8, 32, device=device),
        (cache[0], cache[1, :, :, :7]),
        (cache[0], torch.zeros(1, 1, 16, 32, device=device)[:, :, ::2]),
        torch.zeros(2, 1, 1, 32, 8, device=device).transpose(3, 4),
    ):
        with pytest.raises(ValueError):
            rope_cache_triton(q, k, v, k_cache, v_cache, place(q, cos, sin, *rows))
    with pytest.raises(ValueError):
        rope_cache_triton(q, k, v, *cache, place(q, cos, sin, rows[0], torch.zeros(2, device=device)))
