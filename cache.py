"""The KV cache: the keys and values of a fixed number of seats. Whoever uses it keeps the seats' lengths.

`Cache` is for a CPU: a seat is one piece of memory as long as the longest episode, and neighbouring seats are
a plain view, so that attention gathers nothing. `Pages` is for a GPU: a seat has pages of a few tokens, taken
when it needs them, in any order; a row of a table names them. Moving a seat moves its row of the table, and
two seats that begin alike share pages.

Not here: who sits where, and what happens when no page is left (engine.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from model import Config, Window

PAGE = 64  # tokens; prompts that begin alike share whole pages, on a CPU as copies of so many tokens
ALIGNED = 128  # numbers: where a lent tensor may begin


class Cache:
    """Whole seats: seat r is row r of `kv`."""

    free: Sequence[int] = range(2**31)  # pages that nobody has: never too few
    borrowed = 0  # bytes that learning has kept here, at most

    def __init__(self, c: Config, seats: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.capacity = self.page = capacity
        self.kv = torch.zeros(
            c.layers, seats, 2 * c.kv_heads, capacity, c.head_dim, dtype=dtype, device=device
        )

    def window(self, rows: slice, upto: int, start: Tensor, lens: Tensor | None = None) -> Window:
        """Adjacent seats, truncated to `upto` positions, as a layer's attention reads and writes them."""
        return Window(self.kv[:, rows, :, :upto].unbind(), min(upto, self.capacity), start, lens)

    def share(self, source: int, target: int, length: int) -> None:
        """Let an empty seat begin with the first `length` tokens of another."""
        self.kv[:, target, :, :length] = self.kv[:, source, :, :length]

    def swap(self, a: int, b: int, held_a: int, held_b: int) -> None:
        """Exchange two seats, and the tokens that they hold."""
        kept = self.kv[:, b, :, :held_b].clone() if held_b else None
        self.share(a, b, held_a)
        if kept is not None:
            self.kv[:, a, :, :held_b] = kept

    def lacks(self, seat: int | None, length: int) -> int:
        """How many pages a seat (None: an empty one) still needs to hold `length` tokens."""
        return 0

    def grow(self, seat: int, length: int) -> int:
        """Give a seat those pages, which must be free -> the tokens that it can hold."""
        return self.capacity

    def drop(self, seat: int) -> None:
        """Empty a seat."""

    def update(self) -> None:
        """Bring the table to the device; before a window is used, and never inside a CUDA graph."""

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, a forward pass keeps its activations in the cache, as far as it has room: nobody acts while
        we learn. They are copied, as CUDA graphs expect the cache where it is; what seats held is lost.
        """
        memory, taken = self.kv.view(-1), 0

        def keep(x: Tensor) -> Tensor:
            nonlocal taken
            n = x.numel()
            if x.is_leaf or x.dtype != memory.dtype or taken + n > len(memory):  # a leaf: a weight, or small
                return x
            first, taken = taken, taken + -(-n // ALIGNED) * ALIGNED
            with torch.no_grad():
                return memory[first : first + n].view(x.shape).copy_(x)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            yield
        self.borrowed = max(self.borrowed, min(taken, len(memory)) * memory.itemsize)


class Pages(Cache):
    """Seats of pages. A page that several seats share is full, and never written again; where two seats share
    a part of a page, it is copied."""

    def __init__(
        self, c: Config, seats: int, capacity: int, dtype: torch.dtype, device: torch.device | str,
        pages: int, page: int,
    ):  # fmt: skip
        super().__init__(c, pages, page, dtype, device)
        self.capacity = capacity
        self.free = list(range(pages))
        self.owners = [0] * pages  # seats that have the page
        self.held = [0] * seats  # pages of each seat: the first entries of its row
        self.rows = np.zeros((seats, -(-capacity // page)), np.int32)  # the truth
        self.table = torch.zeros(self.rows.shape, dtype=torch.int32, device=device)  # a copy: graphs read it
        self.changed = False

    def window(self, rows: slice, upto: int, start: Tensor, lens: Tensor | None = None) -> Window:
        """Adjacent rows of the table, with pages for `upto` positions."""
        self.update()
        table = self.table[rows, : -(-upto // self.page)]
        return Window(self.kv.unbind(), table.size(1) * self.page, start, lens, table)

    def share(self, source: int, target: int, length: int) -> None:
        whole, rest = divmod(length, self.page)
        self.rows[target, :whole] = self.rows[source, :whole]
        self.held[target], self.changed = whole, True
        for page in self.rows[source, :whole].tolist():
            self.owners[page] += 1
        if rest:
            self.grow(target, length)
            old, new = self.rows[[source, target], whole].tolist()
            self.kv[:, new, :, :rest] = self.kv[:, old, :, :rest]

    def swap(self, a: int, b: int, held_a: int, held_b: int) -> None:
        self.rows[[a, b]] = self.rows[[b, a]]
        self.held[a], self.held[b] = self.held[b], self.held[a]
        self.changed = True

    def lacks(self, seat: int | None, length: int) -> int:
        held = 0 if seat is None else self.held[seat]
        return max(0, -(-length // self.page) - held)

    def grow(self, seat: int, length: int) -> int:
        for _ in range(self.lacks(seat, length)):
            page = self.free.pop()
            self.owners[page] = 1
            self.rows[seat, self.held[seat]] = page
            self.held[seat], self.changed = self.held[seat] + 1, True
        return self.held[seat] * self.page

    def drop(self, seat: int) -> None:
        for page in self.rows[seat, : self.held[seat]].tolist():
            self.owners[page] -= 1
            if not self.owners[page]:
                self.free.append(page)
        self.held[seat] = 0

    def update(self) -> None:
        if self.changed:
            self.table.copy_(torch.from_numpy(self.rows))
            self.changed = False
