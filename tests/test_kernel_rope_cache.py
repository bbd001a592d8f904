"""RoPE with the cache write, against the reference to the bit: positions, padding, the edges of a seat."""

import pytest
import torch
from test_kernel_rope import BOUND, fp64, packed, table

from kernels.place import Place
from kernels.rope import rope_torch
from kernels.rope_cache import rope_cache_torch, rope_cache_triton
from kernels.tools.measure import relative_rms

pytestmark = pytest.mark.usefixtures("filled_with_nan")


def place(qkv, cos, sin, start, lens):
    return Place(start, qkv.size(1), 0, lens, cos, sin, qkv.dtype)


def joined(B, T, H, KV, D, dtype, device):
    """(B, T, H + 2 KV, D): the heads of q, k and v side by side."""
    return torch.cat(packed(B, T, H, KV, D, dtype, device), 2)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T", [1, 5])
def test_the_cache_write_equals_the_reference(device, program_order, T, dtype):
    """Tokens stand at their row's positions, padding is not written, the rest of the seat is left alone."""
    B, H, KV, D, L = 3, 3, 3, 10, 13
    qkv = joined(B, T, H, KV, D, dtype, device)
    cos, sin = table(9, D, device)  # the padding of the last row points past the table
    start = torch.tensor([0, 3, 7], device=device)
    lens = torch.tensor([1, 1, 1] if T == 1 else [5, 3, 2], device=device)
    whole = torch.randn(B, 2 * KV, 2 * L, D, device=device).to(dtype)
    mine, theirs = whole.clone(), whole.clone()
    q_mine = rope_cache_triton(qkv, mine[:, :, :L], place(qkv, cos, sin, start, lens))
    q_theirs = rope_cache_torch(qkv, theirs[:, :, :L], place(qkv, cos, sin, start, lens))
    real = torch.arange(T, device=device) < lens[:, None]
    assert torch.equal(q_mine[real], q_theirs[real])
    assert torch.equal(mine, theirs) and not torch.equal(mine, whole)


def test_one_token_a_row_is_no_other_than_many(device):
    """Decoding has a shorter way through the reference, which must write what the longer one writes."""
    qkv = joined(3, 1, 4, 2, 32, torch.float32, device)
    cos, sin = table(9, 32, device)
    start, cache = torch.tensor([4, 0, 8], device=device), torch.zeros(2, 3, 4, 9, 32, device=device)
    q = [
        rope_cache_torch(qkv.clone(), c, place(qkv, cos, sin, start, lens))
        for c, lens in zip(cache, (None, torch.ones_like(start)))
    ]
    assert torch.equal(*q) and torch.equal(*cache) and cache[0].count_nonzero() == qkv[:, :, 4:].numel()


def test_a_full_seat_does_not_spill_into_the_next(device):
    """A token beyond the last position of its seat would overwrite the first key of the next head."""
    qkv = joined(2, 3, 2, 1, 32, torch.float32, device)
    cos, sin = table(16, 32, device)
    cache = torch.zeros(2, 2, 4, 32, device=device)
    start, lens = torch.tensor([3, 0], device=device), torch.tensor([3, 0], device=device)
    rope_cache_triton(qkv, cache, place(qkv, cos, sin, start, lens))
    assert (cache[0, :, 3] != 0).all() and (cache[0, :, :3] == 0).all() and (cache[1] == 0).all()


@pytest.mark.parametrize("H, KV, D", [(8, 1, 128), (6, 3, 96), (3, 3, 10)])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("function", [rope_cache_torch, rope_cache_triton])
def test_equals_fp64(device, function, H, KV, D, dtype):
    """All head dims and groups: what stands in the cache is the rotated key, and the value as it came."""
    q, k, v = packed(1, 3, H, KV, D, dtype, device)
    cos, sin = table(3, D, device)
    q64, k64 = fp64(rope_torch, q, k, cos, sin)
    cache = torch.zeros(1, 2 * KV, 4, D, device=device, dtype=dtype)
    start, lens = torch.tensor([0], device=device), torch.tensor([3], device=device)
    mine = function(torch.cat((q, k, v), 2), cache, place(q, cos, sin, start, lens))
    keys, values = cache.chunk(2, 1)
    assert relative_rms(mine, q64) <= BOUND[dtype]
    assert relative_rms(keys[:, :, :3], k64.transpose(1, 2)) <= BOUND[dtype]
    assert torch.equal(values[:, :, :3], v.transpose(1, 2)) and (cache[:, :, 3] == 0).all()


def test_other_rows_change_nothing(device):
    """Another row's tokens and padding, even NaN, reach neither this row's q nor its seat."""
    qkv = joined(2, 3, 2, 1, 32, torch.float32, device)
    cos, sin = table(8, 32, device)
    start, lens = torch.tensor([2, 0], device=device), torch.tensor([2, 3], device=device)
    cache = torch.zeros(2, 2, 2, 8, 32, device=device)  # before and after
    before = rope_cache_triton(qkv, cache[0], place(qkv, cos, sin, start, lens))
    qkv[0, 2], qkv[1] = torch.nan, torch.nan
    after = rope_cache_triton(qkv, cache[1], place(qkv, cos, sin, start, lens))
    assert torch.equal(before[0, :2], after[0, :2]) and torch.equal(cache[0, 0], cache[1, 0])


def test_what_does_not_fit_is_refused(device):
    """A cache of other heads or of other strides would be written beyond its end."""
    qkv = joined(1, 4, 2, 1, 32, torch.float32, device)
    cos, sin = table(4, 32, device)
    rows = torch.zeros(2, 1, dtype=torch.int64, device=device)
    for cache in (
        torch.zeros(1, 4, 8, 32, device=device),
        torch.zeros(2, 2, 8, 32, device=device),
        torch.zeros(1, 2, 16, 32, device=device)[:, :, ::2],
        torch.zeros(1, 2, 32, 8, device=device).transpose(2, 3),
    ):
        with pytest.raises(ValueError):
            rope_cache_triton(qkv, cache, place(qkv, cos, sin, *rows))
    cache = torch.zeros(1, 2, 8, 32, device=device)
    with pytest.raises(ValueError):
        rope_cache_triton(qkv, cache, place(qkv, cos, sin, rows[0], torch.zeros(2, device=device)))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T", [1, 70])
def test_tokens_go_into_the_pages_that_the_table_names(device, program_order, T, dtype):
    """Rows that begin, end and cross at the edges of pages in any order: both write the same slots, those
    where a plain loop puts the values. Pages that are nobody's, and shared ones, are left alone."""
    H, KV, D, P, starts = 2, 1, 32, 64, [0, 63, 64, 100, 250]
    B, pages = len(starts), 40
    qkv, (cos, sin) = joined(B, T, H, KV, D, dtype, device), table(256, D, device)
    names = torch.randperm(pages, device=device)[: B * 4].view(B, 4).to(torch.int32)
    names[1, 0] = names[2, 0]  # full in both rows, and shared
    start = torch.tensor(starts, device=device)
    lens = torch.tensor([min(T, n) for n in (1, 2, 64, 70, 6)], device=device)  # the last row ends its seat
    before = torch.randn(pages, 2 * KV, P, D, device=device).to(dtype)
    if T > 1:
        start[1] = 64
    mine, theirs = before.clone(), before.clone()
    at = Place(start, T, 4 * P, lens, cos, sin, dtype, names)
    q_mine = rope_cache_triton(qkv, mine, at)
    q_theirs = rope_cache_torch(qkv.clone(), theirs, at)
    real = torch.arange(T, device=device) < lens[:, None]
    assert torch.equal(q_mine[real], q_theirs[real]) and torch.equal(mine, theirs)
    want = before.clone()
    for b in range(B):
        for t in range(int(lens[b])):
            i = int(start[b]) + t
            want[names[b, i // P], KV:, i % P] = qkv[b, t, H + KV :]
    assert torch.equal(mine[:, KV:], want[:, KV:])
