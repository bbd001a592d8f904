"""The backward pass of linear_logp.py: from the gradients of log-probs and entropies to that of the logits.

    z = h W^T / tau        log p = z - lse(z)        dz = (onehot(target) - p) dlogp - p (log p + H) dH

The kernel computes dz of some hundreds of tokens at a time, in a buffer in the type of h, and cuBLAS
multiplies it by W. The logits are recomputed: never storing them is the point.
"""

import math

import torch
from torch import Tensor

from .launch import cdiv, target, tl, triton
from .logits_tile import at_least_fp32, chunks, config, first_row_and_word, logits_tile, tiles, within

BUFFER = 160 << 20  # bytes of dz held at a time: 512 tokens at V = 151,936 in bf16


def dlogits_torch(z, lse, entropy, dlogp, dentropy) -> Tensor:
    """z (N, words), others (N,), dentropy may be None -> tau dz without the one-hot term; overwrites z."""
    z.sub_(lse[:, None])  # log p
    if dentropy is None:
        return z.exp_().mul_(-dlogp[:, None])
    p = z.exp()
    return z.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p).neg_()


def gradient_torch(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """All (N, ...) but W and tau; dentropy may be None -> the gradient of h (N, d), fp32 or fp64."""
    dh = at_least_fp32(h).new_empty(h.shape)
    for n, v, w, z in tiles(h, W, tau):
        dz = dlogits_torch(z, lse[n], entropy[n], dlogp[n], None if dentropy is None else dentropy[n])
        mine, at = within(targets[n], v)
        dz.scatter_add_(1, at[:, None], torch.where(mine, dlogp[n], 0)[:, None]).div_(tau)
        if v.start:
            dh[n].addmm_(dz, w)
        else:
            torch.mm(dz, w, out=dh[n])
    return dh


@triton.jit
def _store(z, i_n, i_v, at, dlogp, dentropy, entropy, p_dz, n_rows, n_words, ENTROPY: tl.constexpr):
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
    _store(z_0, i_n, i_v, at, dlogp, dentropy, entropy, p_dz, n_rows, n_words, ENTROPY)
    _store(z_1, i_n, i_v + WIDTH, at, dlogp, dentropy, entropy, p_dz, n_rows, n_words, ENTROPY)


def gradient_triton(h, W, targets, tau, lse, entropy, dlogp, dentropy) -> Tensor:
    """As gradient_torch, in the type of h; log-sum-exps are in base 2."""
    (V, d), c, dh = W.shape, config(h.dtype, h.size(1), target()), torch.empty_like(h)
    scale, ENTROPY = math.log2(math.e) / tau, dentropy is not None
    for n in chunks(len(h), max(128, BUFFER // (V * h.element_size()) // 128 * 128)):
        N = n.stop - n.start
        dz, grid = h.new_empty(N, V), (cdiv(N, c["BLOCK_N"]) * cdiv(V, c["BLOCK_V"]),)
        _dlogits[grid](
            h[n], W, targets[n], lse[n], entropy[n], dlogp[n], dentropy[n] if ENTROPY else None, dz,
            scale, 1 / tau, N, V, d, ENTROPY=ENTROPY, **c,
        )  # fmt: skip
        torch.mm(dz, W, out=dh[n])
    return dh
