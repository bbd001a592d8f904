"""Positions of new tokens in the seat cache: made once a forward pass and passed to every layer.

The kernels read `start` and `lens` and compute the rest in registers. The references share what is the same
in every layer: the mask, and the angles of the rotation.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rope import signed


@dataclass(frozen=True)
class Place:
    """Row b's token t has position start[b] + t in its seat; tokens t < lens[b] are real, others padding."""

    start: Tensor  # (B,) tokens that each seat already holds
    T: int  # new tokens of a row, with its padding
    L: int  # positions of a seat that attention covers
    lens: Tensor | None = None  # (B,) new tokens of each row; None: all are real
    cos: Tensor | None = None  # (P, D/2) of every position, fp32: only rope_cache needs it
    sin: Tensor | None = None  # (P, D/2)
    dtype: torch.dtype = torch.float32  # of the body

    @cached_property
    def at(self) -> Tensor:
        """(B, T) the positions."""
        return self.start[:, None] + torch.arange(self.T, device=self.start.device)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, L), added to scores: 0 for the keys that a token sees, up to its own, else -inf."""
        hidden = torch.arange(self.L, device=self.start.device) > self.at[:, None, :, None]
        nothing = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        return nothing.masked_fill_(hidden, -torch.inf)

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, 1, D) for `rotate`. Padding past the end of the table gets its last angles."""
        safe = self.at.clamp(max=self.cos.size(0) - 1)
        return signed(self.cos[safe], self.sin[safe], self.dtype)

    @cached_property
    def rows(self) -> Tensor:
        """(B,) 0, 1, ..."""
        return torch.arange(len(self.start), device=self.start.device)

    @cached_property
    def real(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, tokens and positions (N,) of all real tokens."""
        lens = torch.full_like(self.start, self.T) if self.lens is None else self.lens
        rows, tokens = (torch.arange(self.T, device=self.start.device) < lens[:, None]).nonzero().T
        return rows, tokens, self.at[rows, tokens]
