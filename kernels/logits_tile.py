"""A tile of logits, h W^T for some rows and words: used by linear_logp.py and its backward pass.

A *word* is an entry of the vocabulary, a row of the head W (V, d). A program multiplies BLOCK_N rows of h
(N, d) with BLOCK_V words, BLOCK_D columns at a time. Neighbouring programs share their words, so that W
streams through the L2 cache once. `tiles` does the same for the reference, in tiles that fit a CPU's cache.

Not here: what is done with the logits (linear_logp.py and linear_logp_backward.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import Target, next_power_of_2, tl, triton

TILE = 1 << 20  # logits that the reference holds at a time, in a CPU's cache
WORDS = 2048  # words per tile, at most


@triton.jit
def first_row_and_word(n_rows, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Where this program's tile begins."""
    i, n_blocks = tl.program_id(0), tl.cdiv(n_rows, BLOCK_N)
    return i % n_blocks * BLOCK_N, i // n_blocks * BLOCK_V


@triton.jit
def logits_tile(
    p_h, p_w, n, v, n_rows, n_words, d,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h[n:] W[v:]^T (BLOCK_N, BLOCK_V) in fp32. Past the end the last row repeats: mask it."""
    i_d = tl.arange(0, BLOCK_D)
    i_h = tl.minimum(tl.arange(0, BLOCK_N), n_rows - 1 - n)[:, None] * d + i_d[None, :]
    i_w = tl.minimum(tl.arange(0, BLOCK_V), n_words - 1 - v)[None, :] * d + i_d[:, None]
    p_h += n.to(tl.int64) * d
    p_w += v.to(tl.int64) * d
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, d, BLOCK_D):
        if WHOLE:
            h, w = tl.load(p_h + start + i_h), tl.load(p_w + start + i_w)
        else:
            m_d = i_d < d - start
            h = tl.load(p_h + start + i_h, m_d[None, :], 0.0)
            w = tl.load(p_w + start + i_w, m_d[:, None], 0.0)
        z = tl.dot(h, w, z, input_precision="ieee")
    return z


def config(dtype: torch.dtype, d: int, t: Target) -> dict:
    """Blocks, warps and stages of the two kernels that multiply by the head. WHOLE: BLOCK_D divides d."""
    fp32 = dtype == torch.float32  # no tensor cores: for tests and small models
    BLOCK_D = min(32 if fp32 else 64, max(16, next_power_of_2(d)))
    if fp32:
        c = dict(BLOCK_N=64, BLOCK_V=64, num_warps=4, num_stages=2)
    else:  # only sm_90 has registers for the softmax of 256 words in addition to the products
        c = dict(BLOCK_N=128, BLOCK_V=256 if t.arch == 90 else 128, num_warps=8, num_stages=2 if t.hip else 4)
    return c | {"BLOCK_D": BLOCK_D, "WHOLE": d % BLOCK_D == 0}


def chunks(n: int, step: int) -> Iterator[slice]:
    """0..n in slices of at most `step`."""
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or unchanged in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def tiles(h: Tensor, W: Tensor, tau: float) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, words, those words' rows of W and the tile of logits (rows, words), in fp32 or fp64."""
    h, step = at_least_fp32(h), TILE // min(WORDS, len(W))
    for v in chunks(len(W), WORDS):
        w = at_least_fp32(W[v])
        for n in chunks(len(h), step):
            yield n, v, w, (h[n] @ w.T).div_(tau)


def within(targets: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """targets (N,) -> a mask of those among the words v; their index in v (of others: any)."""
    at = targets - v.start
    return (at >= 0) & (targets < v.stop), at.clamp(0, v.stop - v.start - 1)
