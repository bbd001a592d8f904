"""A tile of logits, h W^T for some rows and words: the loop that linear_logp.py shares with its backward.

A program has BLOCK_N rows of h (N, d) and BLOCK_V rows of the head W (V, d), and walks along d in steps of
BLOCK_D. Neighbouring programs have the same words, so that W streams through the L2 cache once.

The reference has tiles too, of a size that stays in a CPU's cache: `tiles`.

Not here: what is done with the logits; that is the business of linear_logp.py and linear_logp_backward.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import Target, tl, triton

TILE = 1 << 20  # logits that the reference holds at a time: they stay in a CPU's cache
WORDS = 2048  # of them in a row, at most


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
    """h[n:] W[v:]^T (BLOCK_N, BLOCK_V) in fp32. Past the end the last row repeats: that is never used."""
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
    BLOCK_D = min(64, max(16, triton.next_power_of_2(d)))
    if dtype == torch.float32:  # no tensor cores: for tests and small models
        BLOCK_D = min(32, BLOCK_D)
        c = dict(BLOCK_N=64, BLOCK_V=64, num_warps=4, num_stages=2)
    else:  # on sm_90 alone the products of 256 words leave room for what follows
        c = dict(BLOCK_N=128, BLOCK_V=256 if t.arch == 90 else 128, num_warps=8, num_stages=2 if t.hip else 4)
    return c | {"BLOCK_D": BLOCK_D, "WHOLE": d % BLOCK_D == 0}


def chunks(n: int, step: int) -> Iterator[slice]:
    """0..n in slices of at most `step`."""
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def tiles(h: Tensor, W: Tensor, tau: float) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, words, those words' rows of W and the tile of logits (rows, words), all in fp32 or wider."""
    h, step = wide(h), TILE // min(WORDS, len(W))
    for v in chunks(len(W), WORDS):
        w = wide(W[v])
        for n in chunks(len(h), step):
            yield n, v, w, (h[n] @ w.T).div_(tau)


def within(targets: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """targets (N,) -> which of them are among the words v, and where (others: anywhere)."""
    at = targets - v.start
    return (at >= 0) & (targets < v.stop), at.clamp(0, v.stop - v.start - 1)
