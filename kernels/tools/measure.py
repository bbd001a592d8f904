"""How fast a kernel is, and against what: cases, timing, the ceilings of this GPU, one table.

Each kernel file says what there is to measure with `cases(m: Model, device)`, which yields a `Case` for every
kind of call that a model of these dimensions makes. The same cases serve three times: compile_check.py runs
them on meta tensors to see every launch of the host code, `python -m kernels` times them on a GPU, and at the
toy's dimensions it runs them under the interpreter, where only the error column means anything.
"""

import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import target

FILES = ("attention", "cached_attention", "linear_logp", "lora", "lora_linear")
FILES += ("quantised", "rms_norm", "rope", "rope_cache", "sample", "swiglu")


class Model(NamedTuple):
    """The dimensions of a model and of the work it is given; see MODELS."""

    name: str
    d: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    batch: int = 8  # rows of a training batch
    length: int = 2048  # tokens of each
    seats: int = 64  # rows decoded together
    context: int = 2048  # tokens that each has in the cache
    rank: int = 16  # of the adapters, and four times that


TOY = Model("toy", 128, 4, 2, 32, 384, 416, torch.float32, 2, 63, 3, 65, 8)
MODELS = {
    m.name: m
    for m in (
        Model("Qwen2.5-0.5B", 896, 14, 2, 64, 4864, 151936),
        Model("Qwen2.5-3B", 2048, 16, 2, 128, 11008, 151936),
        Model("Qwen2.5-7B", 3584, 28, 4, 128, 18944, 152064),
        Model("Llama-3.2-3B", 3072, 24, 8, 128, 8192, 128256),
        TOY,
    )
}


@dataclass(frozen=True)
class Case:
    """One call, the work in it, and what else could do it: `rivals`, of which the first is the reference.

    `run` launches the kernels (the triton wrapper, not the chosen function) and returns a tensor or a tuple.
    `bytes` is the least that must move, `flops` what the formula needs: give the one that bounds it.
    """

    name: str
    run: Callable[[], Tensor | tuple]
    rivals: dict[str, Callable[[], Tensor | tuple]] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0


def modules(names: Iterable[str] = FILES) -> Iterator[tuple[str, ModuleType]]:
    """Name and module of every kernel file, or of these."""
    return ((name, importlib.import_module(f"kernels.{name}")) for name in names)


def compiled(f: Callable, device: str) -> dict[str, Callable]:
    """A rival: what torch.compile makes of f, anew for each case and for its shapes alone. Only on a GPU."""
    if device != "cuda":
        return {}
    torch._dynamo.reset()  # after eight shapes of one function it would give up, in silence
    torch._functorch.config.donated_buffer = False  # backward() keeps the graph
    return {"compile": torch.compile(f, dynamic=False)}


def backward(forward: Callable, inputs: tuple, gradients: Tensor | tuple) -> Callable[[], tuple]:
    """A call that runs the backward pass alone, as often as one likes. The first runs `forward` too: a rival
    that cannot run here, or that takes much memory, does no harm before its turn.
    """
    outputs = cache(forward)
    return lambda: torch.autograd.grad(outputs(), inputs, gradients, retain_graph=True)


def versus(name: str, kernel: Callable, rivals: dict, *inputs, gradients=None, **work: int) -> Case:
    """A case that gives the kernel and its rivals the same inputs; with gradients: their backward pass."""
    leaves = tuple(x for x in inputs if isinstance(x, Tensor) and x.requires_grad)

    def call(f: Callable) -> Callable:
        run = partial(f, *inputs)
        return run if gradients is None else backward(run, leaves, gradients)

    return Case(name, call(kernel), {name: call(f) for name, f in rivals.items()}, **work)


def relative_rms(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth|, root mean squares, in fp64. NaN in x gives NaN, which is below no bound."""
    x, truth = x.detach().double(), truth.detach().double()
    return ((x - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt().clamp(min=1e-30)).item()


def milliseconds(run: Callable, repeats: int = 20) -> float:
    """Median time of one call, with a cold L2 cache, after three to warm up; on a CPU that of one."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    # 1 GB empties any L2, and takes an H100 0.4 ms: meanwhile the host gets ahead, so launching is not timed.
    flush = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in spans:
        flush.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in spans)


def peak_megabytes(run: Callable) -> float:
    """What one call allocates at its peak beyond what was there. 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


UNITS = {"copy": ("GB/s", 1e9), "matmul": ("TFLOP/s", 1e12)}


@cache
def ceilings() -> dict[str, float]:
    """Measured here, a second: bytes read and written by a plain copy of 1 GB, operations of a bf16 matmul of
    8192 cubed. Zeros on a CPU.
    """
    if not torch.cuda.is_available():
        return dict.fromkeys(UNITS, 0.0)
    x, y = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    copy = 2 * x.numel() / milliseconds(lambda: y.copy_(x)) * 1e3
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {"copy": copy, "matmul": 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3}


def tensors(out: Tensor | tuple) -> list[Tensor]:
    """What a case returns, as a list."""
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


def error(case: Case) -> float:
    """The largest relative RMS error of a case's outputs against its first rival."""
    reference = next(iter(case.rivals.values()))()
    pairs = zip(tensors(case.run()), tensors(reference), strict=True)
    return max((relative_rms(x, y) for x, y in pairs), key=lambda e: (math.isnan(e), e))


def _or_nan(number: Callable[..., float], *args) -> float:
    """NaN for a rival that cannot run here: out of memory, or a backend that this GPU lacks."""
    try:
        return number(*args)
    except RuntimeError:
        return math.nan


def measure(case: Case) -> dict:
    """Time, rate, share of the ceiling, error against the first rival, speed-up over each rival."""
    ms = milliseconds(case.run)
    row = {"case": case.name, "ms": ms, "MB": peak_megabytes(case.run)}
    for work, (of, ceiling) in zip((case.bytes, case.flops), ceilings().items()):
        if work:
            rate, (unit, scale) = work / ms * 1e3, UNITS[of]
            row |= {unit: rate / scale, f"of {of}": rate / ceiling if ceiling else 0.0}
    row |= {f"vs {name}": _or_nan(milliseconds, rival) / ms for name, rival in case.rivals.items()}
    return row | ({"error": _or_nan(error, case)} if case.rivals else {})


def line(row: dict) -> str:
    """One measurement as one line of the table."""
    numbers = [k for k, v in row.items() if not isinstance(v, str) and (v or k == "error")]
    shown = (f"{k} {row[k]:.3g}" for k in numbers)
    return f"{row['model']:13s} {row['kernel']:17s} {row['case']:34s} " + "  ".join(shown)


def about() -> dict[str, str | float]:
    """What the figures were measured on, and its two ceilings."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "the interpreter on a CPU: times mean nothing",
        "target": target().name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": time.strftime("%Y-%m-%d"),
    } | {f"{of} {unit}": round(ceilings()[of] / scale) for of, (unit, scale) in UNITS.items()}


def bench(names: Iterable[str], models: Iterable[Model], out: str | None = None) -> list[dict]:
    """Measure the cases of these kernels, print a line for each, and write them all as JSON to `out`."""
    here, rows = about(), []
    print(", ".join(f"{k} {v}" for k, v in here.items()), flush=True)
    for m in models:
        for name, module in modules(name for name in FILES if name in names):
            for case in module.cases(m, "cuda" if torch.cuda.is_available() else "cpu"):
                rows.append({"model": m.name, "kernel": name, **measure(case)})
                print(line(rows[-1]), flush=True)
    if out:
        Path(out).write_text(json.dumps(here | {"rows": rows}, indent=1), encoding="utf-8")
    return rows
