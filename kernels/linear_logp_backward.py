"""The backward pass of linear_logp.py: from the gradients of log-probs and entropies to that of the logits.

    z = h W^T / tau        log p = z - lse(z)        dz = (onehot(target) - p) dlogp - p (log p + H) dH

Here is dz alone, of some hundreds of tokens at a time, into a buffer in the type of h; linear_logp.py then
multiplies it by W. The logits are computed again: keeping them is what this file is there to avoid.
"""

import math

import torch
from torch import Tensor

from .launch import target, tl, triton
from .logits_tile import chunks, config, first_row_and_word, logits_tile

WORDS = 4096  # rows of a head of halves that are widened at a time on a CPU


def wide_logits(h: Tensor, W: Tensor) -> Tensor:
    """h (N, d), W (V, d) -> h W^T (N, V) in fp32 or wider: rounded to bf16 they make p wrong by a percent."""
    if h.dtype not in (torch.bfloat16, torch.float16):
        return h @ W.T
    if h.is_cuda and torch.version.hip is None:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    z, h = h.new_empty(len(h), len(W), dtype=torch.float32), h.float()
    for v in chunks(len(W), WORDS):
        z[:, v] = h @ W[v].float().T
    return z


def dlogits_torch(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """All (N, ...) but W and tau; dentropy may be None -> the gradient of h W^T, (N, V) in the type of h."""
    dz = wide_logits(h, W).div_(tau).sub_(lse[:, None])  # (N, V) log p
    if dentropy is None:
        dz.exp_().mul_(-dlogp[:, None])
    else:
        p = dz.exp()
        dz.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p).neg_()
    dz.scatter_add_(1, targets[:, None], dlogp[:, None])
    return dz.div_(tau).to(h.dtype)


@triton.jit
def _leave(z, i_n, i_v, at, dlogp, dentropy, entropy, p_dz, n_rows, n_words, ENTROPY: tl.constexpr):
    """Store the gradient of logits whose log2 p are z (rows, words)."""
    slope = dlogp[:, None]
    if ENTROPY:
        slope += dentropy[:, None] * (0.6931471805599453 * z + entropy[:, None])
    dz = tl.where(i_v[None, :] == at[:, None], dlogp[:, None], 0.0) - tl.exp2(z) * slope
    m = (i_n < n_rows)[:, None] & (i_v < n_words)[None, :]
    tl.store(p_dz + i_n.to(tl.int64)[:, None] * n_words + i_v[None, :], dz.to(p_dz.dtype.element_ty), m)


@triton.jit
def _dlogits(
    p_h, p_w, p_targets, p_lse, p_entropy, p_dlogp, p_dentropy, p_dz, scale, inverse_tau, n_rows, n_words, d,
    WHOLE: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_V // 2
    n, v = first_row_and_word(n_rows, BLOCK_N, BLOCK_V)
    z = logits_tile(p_h, p_w, n, v, n_rows, n_words, d, WHOLE, BLOCK_N, BLOCK_V, BLOCK_D) * scale
    i_n, i_v = n + tl.arange(0, BLOCK_N), v + tl.arange(0, WIDTH)
    m_n = i_n < n_rows
    z -= tl.load(p_lse + i_n, m_n, other=0.0)[:, None]  # log2 p
    at = tl.load(p_targets + i_n, m_n, other=-1).to(tl.int32)
    dlogp = tl.load(p_dlogp + i_n, m_n, other=0.0) * inverse_tau
    dentropy, entropy = dlogp, dlogp  # unused
    if ENTROPY:
        dentropy = tl.load(p_dentropy + i_n, m_n, other=0.0) * inverse_tau
        entropy = tl.load(p_entropy + i_n, m_n, other=0.0)
    # One half after the other: with the exponentials of both alive, sm_90 spills.
    z_0, z_1 = tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, WIDTH)), (0, 2, 1)))
    _leave(z_0, i_n, i_v, at, dlogp, dentropy, entropy, p_dz, n_rows, n_words, ENTROPY)
    _leave(z_1, i_n, i_v + WIDTH, at, dlogp, dentropy, entropy, p_dz, n_rows, n_words, ENTROPY)


def dlogits_triton(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """As dlogits_torch, with log-sum-exps in base 2."""
    (N, d), V, c = h.shape, len(W), config(h.dtype, h.size(1), target())
    dz = h.new_empty(N, V)
    grid = (triton.cdiv(N, c["BLOCK_N"]) * triton.cdiv(V, c["BLOCK_V"]),)
    _dlogits[grid](
        h, W, targets, lse, entropy, dlogp, dentropy, dz, math.log2(math.e) / tau, 1 / tau, N, V, d,
        ENTROPY=dentropy is not None, **c,
    )  # fmt: skip
    return dz
