"""Where our time goes, by timers around the kernels' functions. The rest is Python, small operations and the
timers themselves."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch

import kernels
import model as models

from . import timing
from .timing import Row, Run, progress, timed
from .work import DEVICE, SMALL, Body, Workload, engine, generate_ours, threads, with_roles

PARTS = {
    "products": (models, "product"),
    "adapters": (models, "adapt"),
    "attention": (kernels, "cached_attention"),
    "RMSNorm": (kernels, "rms_norm"),
    "RoPE and cache": (kernels, "rope_cache"),
    "SwiGLU": (kernels, "swiglu"),
    "sampling": (kernels, "sample"),
}


def rows(p: Run) -> Iterator[Row]:
    if DEVICE == "cuda":
        yield Row("not on a GPU, where calls return before their work is done", "", note="python -m kernels")
        return
    n, w = p.few(4, 64), p.few(SMALL, Workload())
    for b, batch in zip(p.bodies(torch.float32, torch.float32, torch.bfloat16), (32, 1, 32, 32)):
        name = f"{b}, batch {batch}, {n} tokens, prefill included: a step of all rows"
        e = engine(b.ours(), batch, 32 + n + 1)
        with threads(b.threads):
            yield shares(name, partial(generate_ours, e, b.prompts(batch, 32), n, 0.0), n)
    with threads(1):
        call = partial(w.act, w.engine(with_roles(Body().ours(w.context + 1))))
        yield shares(f"{Body()}, episodes, {w.questions} questions x {w.group}", call, 1)


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Times each of PARTS while the block runs: {part: seconds}."""
    spent = dict.fromkeys(PARTS, 0.0)

    def clock(part: str, f: Callable, *args, **kwargs):
        began = timing.clock()
        out = f(*args, **kwargs)
        spent[part] += timing.clock() - began
        return out

    with ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            timed_part = partial(clock, part, getattr(module, name))
            stack.enter_context(patch.object(module, name, timed_part))
        yield spent


def shares(name: str, call: Callable[[], object], steps: int) -> Row:
    """The row of a call: milliseconds per step without timers, and the share of each part with them."""
    progress("profile", name)
    call()
    plain = min(timed(call) for _ in range(2))
    with clocked() as spent:
        whole = timed(call)
    spent["the rest"] = whole - sum(spent.values())
    note = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in spent.items() if seconds)
    return Row(name, f"{1e3 * plain / steps:,.3g} ms", note=note)
