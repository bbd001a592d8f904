"""Attention against the seat cache, against fp64: decoding and extension, chunks, other tenants' leavings."""

import importlib

import pytest
import torch

from kernels.cached_attention import cached_attention_torch, chunks, config
from kernels.cached_attention import cached_attention_triton as cached_attention_at
from kernels.launch import TARGETS
from kernels.place import Place
from kernels.tools.measure import relative_rms

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.usefixtures("filled_with_nan")


def seats(B, T, H, KV, D, L, dtype, device):
    """q, and a cache as on a CPU: some neighbouring whole seats of a larger one."""
    torch.manual_seed(0)
    cache = torch.randn(B + 2, 2 * KV, L, D, device=device).to(dtype)
    return torch.randn(B, T, H, D, device=device).to(dtype), cache[1 : B + 1]


def at(q, cache, start, table=None, lens=None):
    L = cache.size(2) * (1 if table is None else table.size(1))
    return Place(start, q.size(1), L, lens, dtype=q.dtype, table=table)


def cached_attention_triton(q, cache, start, *pages):
    return cached_attention_at(q, cache, at(q, cache, start, *pages))


def truth(q, cache, start, *pages):
    q, cache = q.double(), cache.double()
    return cached_attention_torch(q, cache, at(q, cache, start, *pages))


def starts(B, T, L, device):
    """The first row empty before this call, the last one filled by it, the others between."""
    return torch.linspace(0, L - T, B, device=device).long()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "B, T, H, KV, D, L",
    [
        (3, 1, 8, 1, 128, 111),
        (2, 1, 14, 2, 64, 65),
        (1, 1, 2, 2, 96, 1),
        (2, 63, 2, 1, 32, 130),
        (2, 9, 14, 2, 64, 70),
        (1, 20, 16, 2, 96, 65),
        (1, 65, 3, 3, 64, 65),
        (2, 5, 3, 1, 40, 77),
    ],
)
def test_equals_fp64(device, B, T, H, KV, D, L, dtype):
    """Decoding and extension; groups of 1 to 8; blocks of 16, 64 and 128 rows; one seat and many."""
    q, cache = seats(B, T, H, KV, D, L, dtype, device)
    start = starts(B, T, L, device)
    mine = cached_attention_triton(q, cache, start)
    assert mine.dtype == dtype and relative_rms(mine, truth(q, cache, start)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_chunks_are_merged(device, pretend_to_be, program_order, T, dtype):
    """Rows of one key to all of them, over three chunks: empty, partial and full ones, in any order."""
    B, L = 4, 803
    q, cache = seats(B, T, 4, 2, 32, L, dtype, device)
    assert chunks(B * 2, T == 1, L, TARGETS["sm_90"]) == 3
    start = torch.tensor([0, 255, 256, L - T], device=device)
    with pretend_to_be("sm_90"):
        mine = cached_attention_triton(q, cache, start)
    assert relative_rms(mine, truth(q, cache, start)) <= BOUND[dtype]


@pytest.mark.parametrize("T, L", [(1, 100), (1, 603), (5, 101), (5, 600)])
def test_earlier_tenants_and_other_rows_change_nothing(device, T, L):
    """Keys past a row's last token, and other seats, may hold anything: the row's output keeps every bit."""
    q, cache = seats(2, T, 4, 2, 64, L, torch.bfloat16, device)
    start = torch.tensor([L // 2, 7], device=device)
    before = cached_attention_triton(q, cache, start)
    k, v = cache.chunk(2, 1)
    for x, poison in ((k, 1e4), (v, -1e4)):
        x[0, :, L // 2 + T :] = poison
        x[1] = poison
    assert torch.equal(before[0], cached_attention_triton(q, cache, start)[0])


@pytest.mark.parametrize("T", [1, 4])
def test_nothing_is_read_past_the_last_query(device, T):
    """NaN there, as in a cache that was never written, does not reach the output (0 * NaN would)."""
    q, cache = seats(1, T, 4, 2, 32, 97, torch.bfloat16, device)
    start = torch.tensor([40], device=device)
    cache[:, :, 40 + T :] = float("nan")
    assert cached_attention_triton(q, cache, start).isfinite().all()


@pytest.mark.parametrize("T, L", [(40, 64), (80, 70)])
def test_padding_may_point_past_the_cache(device, T, L):
    """A row nearly full, in a batch of longer turns: its padding stands past the seat's end. L = 70 is
    no multiple of a block of keys: a whole block across it would read the next seat, or beyond the cache."""
    q, cache = seats(2, T, 2, 1, 32, L, torch.float32, device)
    start = torch.tensor([0, 60], device=device)
    mine, theirs = cached_attention_triton(q, cache, start), truth(q, cache, start)
    assert relative_rms(mine[0], theirs[0]) <= 1e-5 and relative_rms(mine[1, :4], theirs[1, :4]) <= 1e-5


def test_prefill_equals_training(device):
    """From an empty seat it is causal attention: the same numbers as the training kernel."""
    from kernels.attention import attention_triton

    q, cache = seats(1, 70, 4, 2, 64, 70, torch.float32, device)
    o = attention_triton(q, *cache.transpose(1, 2).chunk(2, 2))
    mine = cached_attention_triton(q, cache, torch.zeros(1, dtype=torch.int32, device=device))
    assert relative_rms(mine, o) <= 1e-6


def test_tokens_one_by_one_or_at_once(device):
    """Decoding token by token gives what extending by all of them gives."""
    q, cache = seats(2, 5, 4, 2, 32, 40, torch.float32, device)
    start = torch.tensor([3, 30], device=device)
    at_once = cached_attention_triton(q, cache, start)
    one_by_one = [cached_attention_triton(q[:, t : t + 1], cache, start + t) for t in range(5)]
    assert relative_rms(torch.cat(one_by_one, 1), at_once) <= 1e-6


@pytest.mark.parametrize("target", TARGETS)
def test_every_choice_of_blocks(device, pretend_to_be, target):
    """The blocks chosen for each GPU give the same result here: 8, 40 and 160 rows, in chunks or not."""
    with pretend_to_be(target):
        for T in (1, 5, 20):
            q, cache = seats(1, T, 8, 1, 128, 523, torch.bfloat16, device)
            start = torch.tensor([300], device=device)
            mine = cached_attention_triton(q, cache, start)
            assert relative_rms(mine, truth(q, cache, start)) <= 5e-3


def test_the_launch_does_not_depend_on_lengths(device, monkeypatch):
    """A CUDA graph replays the launch for other rows: the grid and arguments must be those of the shapes."""
    file = importlib.import_module("kernels.cached_attention")  # the package has a function of that name
    grids = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(file, "_cached", Recorder(file._cached))
    q, cache = seats(2, 1, 4, 2, 32, 600, torch.float32, device)
    for start in ([0, 0], [599, 3]):
        cached_attention_triton(q, cache, torch.tensor(start, device=device))
    assert len(grids) == 2 and grids[0] == grids[1]


def test_chunks_fill_the_processors():
    """One short row stays whole; one long row is cut; a full batch of long prompts is not."""
    t = TARGETS["sm_90"]
    assert chunks(2, True, 256, t) == 1
    assert chunks(2, True, 4096, t) == 16
    assert chunks(128, True, 2048, t) == 8
    assert chunks(4096, False, 4096, t) == 1
    assert config(16, 128, False, t)["BM"] == 16


PAGE = 64


def paged(lengths, T, KV, D, dtype, device, columns=5):
    """A cache of pages, NaN but where rows have tokens: rows of these lengths, their last T tokens new. The
    first row's first page is the second row's too, and entries beyond a row's pages are of anybody's."""
    torch.manual_seed(1)
    pages = len(lengths) * columns + 3
    cache = torch.full((pages, 2 * KV, PAGE, D), float("nan"), dtype=dtype, device=device)
    table = torch.randint(0, pages, (len(lengths), columns), dtype=torch.int32, device=device)
    free = iter(torch.randperm(pages).tolist())
    for b, n in enumerate(lengths):
        for i in range(-(-n // PAGE)):
            shared = i == 0 and b == 1 and n > PAGE < lengths[0]
            table[b, i] = table[0, 0] if shared else next(free)
            end = PAGE if shared else min(PAGE, n - i * PAGE)
            cache[table[b, i], :, :end] = torch.randn(2 * KV, end, D, device=device).to(dtype)
    q = torch.randn(len(lengths), T, 2 * KV, D, device=device).to(dtype)
    return q, cache, table


def gathered(cache, table, n):
    """(1, 2 KV, n, D) a row's keys and values, one by one."""
    return torch.stack([cache[table[i // PAGE], :, i % PAGE] for i in range(n)], 1)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, target", [(1, "sm_90"), (1, "sm_80"), (3, "sm_90"), (70, "sm_86")])
def test_pages_in_any_order(device, pretend_to_be, program_order, T, target, dtype):
    """A row's tokens are where its table says: rows that end before, on and after a page's end, a page
    that two rows share. Every other slot is NaN, as if left by a tenant who has gone: none may be read."""
    lengths = [PAGE * 2 + 6, PAGE + 10, T, 64, 65, 63, 128, 320]
    lengths = [max(n, T) for n in lengths]
    q, cache, table = paged(lengths, T, 2, 32, dtype, device)
    held = torch.tensor(lengths, device=device) - T
    with pretend_to_be(target):
        mine = cached_attention_triton(q, cache, held, table, torch.full_like(held, T))
    assert mine.isfinite().all()
    for b, n in enumerate(lengths):
        want = truth(q[b : b + 1], gathered(cache, table[b], n), held[b : b + 1])
        assert relative_rms(mine[b : b + 1], want) <= BOUND[dtype]


@pytest.mark.parametrize("padded", [1, 9])
def test_padding_of_a_row_reads_no_page_that_is_not_its_own(device, padded):
    """A short turn in a batch of long ones: its padding stands in pages that the row does not have, where a
    weight of 0 times NaN would be NaN in its real tokens too. A row that is not on reads one key."""
    q, cache, table = paged([40, 64, 130], 80, 2, 32, torch.float32, device)
    held, lens = torch.tensor([40 - padded, 63, 50]), torch.tensor([padded, 1, 80])
    held, lens = held.to(device), lens.to(device)
    mine = cached_attention_triton(q, cache, held, table, lens)
    for b in range(3):
        n = int(held[b] + lens[b])
        real = q[b : b + 1, : lens[b]]
        want = truth(real, gathered(cache, table[b], n), held[b : b + 1])
        assert relative_rms(mine[b : b + 1, : lens[b]], want) <= 1e-5
    cache[table[0, 0], :, 0] = 1.0
    off = cached_attention_triton(q[:1, :1], cache, held[:1] * 0, table[:1], held[:1] * 0)
    assert off.isfinite().all()


def test_the_reference_gathers_what_the_table_says(device):
    """The engine's tests with pages run on it."""
    lengths = [130, 74, 64, 1]
    q, cache, table = paged(lengths, 1, 2, 32, torch.float32, device)
    cache = cache.nan_to_num(9e3)  # it reads whole pages, with weight 0
    held = torch.tensor(lengths, device=device) - 1
    for b, n in enumerate(lengths):
        want = truth(q[b : b + 1], gathered(cache, table[b], n), held[b : b + 1])
        assert relative_rms(truth(q, cache, held, table)[b : b + 1], want) < 1e-12


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda q, c, s, t: (q, c[..., 1:], s), "do not fit"),
        (lambda q, c, s, t: (q[:, :, :3], c, s), "multiple"),
        (lambda q, c, s, t: (q, c.half(), s), "all bf16, fp16 or fp32"),
        (lambda q, c, s, t: (q, c, s[:1]), "start"),
        (lambda q, c, s, t: (q, c[:1], s), "do not fit"),
        (lambda q, c, s, t: (q, c, s, t[:1]), "do not fit"),
        (lambda q, c, s, t: (q, c, s, t), "pages of 8 tokens"),
        (lambda q, c, s, t: (q, c.transpose(1, 2).contiguous().transpose(1, 2), s), "contiguous"),
    ],
)
def test_bad_input_is_named(device, change, complaint):
    """Each would otherwise read the wrong memory, and say nothing."""
    q, cache = seats(2, 1, 4, 2, 32, 8, torch.float32, device)
    given = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, 3, dtype=torch.int32, device=device),
    )
    with pytest.raises(ValueError, match=complaint):
        cached_attention_triton(*change(q, cache, *given))
