"""Positions of new tokens in the cache: made once per forward pass, for all layers.

A layer's cache is (pages, 2 KV, P, D), the heads of k and then those of v. Position i of row b is in page
table[b, i // P], at i % P; without a table, row b's page is page b, and holds all it has.

The Triton kernels read `start`, `lens` and the table, and compute the rest in registers. The references share
here what is the same in every layer: the mask, and the angles of the rotation.
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
    table: Tensor | None = None  # (B, pages of a row) int32; None: page b is row b's only one

    @cached_property
    def at(self) -> Tensor:
        """(B, T) the positions."""
        return self.start[:, None] + torch.arange(self.T, device=self.start.device)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, L), added to scores: 0 for keys up to a token's own position, -inf for later ones."""
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
    def pages(self) -> Tensor:
        """(B, pages of a row) the table, also where there is none."""
        return self.rows[:, None] if self.table is None else self.table

    def slots(self, rows: Tensor, at: Tensor, P: int) -> tuple[Tensor, Tensor]:
        """rows, positions (N,) -> pages of P tokens, and where in them (N,)."""
        return (rows, at) if self.table is None else (self.table[rows, at // P], at % P)

    @cached_property
    def real(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, tokens and positions (N,) of all real tokens."""
        lens = torch.full_like(self.start, self.T) if self.lens is None else self.lens
        rows, tokens = (torch.arange(self.T, device=self.start.device) < lens[:, None]).nonzero().T
        return rows, tokens, self.at[rows, tokens]
