"""A row of the table, and how it is measured: timers, alternating runs, peak memory, growth exponents.

Not a profiler: the wall clock around whole calls, and the bytes of the tensors that they make.
"""

import re
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .work import Body

HEADS = ("", "ours", "theirs", "ratio", "spread", "")
clock = time.perf_counter


class Row(NamedTuple):
    """A line of the table. ratio: theirs / ours, more than 1 where ours is better, or a fitted exponent."""

    name: str
    ours: str
    theirs: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        spread = "" if self.spread is None else f"{self.spread[0]:.2f} to {self.spread[1]:.2f}"
        return self.name, self.ours, self.theirs, ratio, spread, self.note


class Run(NamedTuple):
    """How to run. checkpoint: a directory, or "" for the toy body alone."""

    checkpoint: str = ""
    quick: bool = False
    threads: int = 1
    seconds: float = 20.0  # for repeating one row, at least twice
    corpus: str = ""  # passages, for `bits`

    def few(self, quick, full):
        return quick if self.quick else full

    def bodies(self, *dtypes: torch.dtype) -> list[Body]:
        """The toy in fp32 on one thread; then the checkpoint, if there is one, in each of these types."""
        name = Path(self.checkpoint).name
        return [Body()] + [Body(name, self.checkpoint, d, self.threads) for d in dtypes if self.checkpoint]


def absent(name: str) -> Row:
    return Row(name, "", "peer not installed", note="pip install -r requirements-bench.txt")


def progress(*words: object) -> None:
    """What is being measured, on stderr, so that stdout is only the table."""
    print("...", *words, file=sys.stderr, flush=True)


def now() -> float:
    """The time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's work included."""
    began = clock()
    call()
    return now() - began


def alternate(p: Run, *calls: Callable) -> list[list[float]]:
    """Seconds of each call, alternating: 2 to 7 times each, as `p.seconds` allows (once in a smoke run)."""
    spans: list[list[float]] = [[] for _ in calls]
    least, most = p.few((1, 1), (2, 7))
    began = clock()
    while len(spans[0]) < least or (len(spans[0]) < most and clock() - began < p.seconds):
        for span, call in zip(spans, calls):
            span.append(timed(call))
    return spans


def median_of(p: Run, call: Callable[[], float]) -> float:
    """The median of 5 values (of 1 in a smoke run), after one call to warm up."""
    call()
    return statistics.median(call() for _ in range(p.few(1, 5)))


def versus(name: str, spans: tuple[list[float], list[float]], tokens: int = 0, note: str = "") -> Row:
    """The row of two lists of seconds; with `tokens` the columns are tokens per second."""
    ours, theirs = (statistics.median(s) for s in spans)
    ratios = [b / a for a, b in zip(*spans)]
    shown = [f"{tokens / s:,.0f} tok/s" if tokens else f"{s:.3g} s" for s in (ours, theirs)]
    return Row(name, *shown, statistics.median(ratios), (min(ratios), max(ratios)), note)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The exponent b of the power law a x^b, fitted by least squares to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grows(name: str, sizes: list[int], values: list[float], unit: str, against: list[int] = ()) -> Row:
    """The row of a quantity that grows with `sizes`; the exponent is fitted to `against`, if given."""
    scale, unit = (2**20, "MiB") if unit == "bytes" else (1e-3, "ms")
    shown = " ".join(f"{v / scale:.3g}" for v in values) + f" {unit}"
    name += f" {', '.join(map(str, sizes))}"
    return Row(name, shown, ratio=exponent(against or sizes, values), note="exponent")


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is active: live bytes, their peak, the largest tensor.

    It sees every operation of this thread on any device (even meta), the backward pass included, but not what
    an operation allocates and frees internally, nor packed copies (which belong to oneDNN).
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.largest_shape: tuple[int, ...] = ()
        self.known: set[int] = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        given = {storage._cdata for storage, _ in self.storages((args, kwargs))}
        out = f(*args, **(kwargs or {}))
        for storage, shape in self.storages(out):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.known:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                if size > self.largest:
                    self.largest, self.largest_shape = size, shape
                weakref.finalize(storage, self.forget, key, size)
        return out

    @staticmethod
    def storages(tree: object) -> list[tuple[torch.UntypedStorage, tuple[int, ...]]]:
        tensors = (x for x in tree_iter(tree) if isinstance(x, Tensor) and not x.is_mkldnn)
        return [(x.untyped_storage(), tuple(x.shape)) for x in tensors]

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def metered(call: Callable[[], object]) -> Meter:
    """The meter of one call."""
    with Meter() as meter:
        call()
    return meter


def peak(key: str = "VmHWM") -> int:
    """Peak bytes since `forget_peak`, on the GPU if there is one; 0 where there is no /proc."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    return int(re.search(rf"{key}:\s*(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0


def forget_peak() -> int:
    """Reset the peak of memory. Returns the bytes held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak("VmRSS")  # on a GPU a peak that was just reset is what is held
