"""Our engine: against transformers' `generate`, in whole episodes too, and where its time goes."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch

import kernels
import model as models
from model import Model

from . import timing, work
from .timing import Row, Run, absent, alternate, progress, timed, versus
from .work import DEVICE, SMALL, Body, Workload, engine, generate_ours, generate_theirs, installed, threads


def sampling(p: Run) -> Iterator[Row]:
    """Sampling by our engine and by transformers' `generate`: greedy, and one row at temperature 1. "Products
    alone" is the rate if only the matmuls of prompts and sampled tokens took time. On a CPU that multiplies
    bf16 more slowly than fp32, our engine uses fp32 copies of the matrices from 16 rows on, for three times
    the memory of the weights."""
    batches, lengths = p.few((1, 3), (1, 8, 32)), p.few((8,), (64, 256))
    for b in p.bodies(torch.float32, torch.bfloat16):
        if not installed("transformers"):
            yield absent(str(b))
            continue
        ours, theirs = b.ours(), b.theirs()
        for batch, n in itertools.product(batches, lengths):
            for temperature in (0.0, 1.0) if (batch, n) == (batches[-1], lengths[0]) else (0.0,):
                with threads(b.threads):
                    yield sampled(p, b, ours, theirs, batch, n, temperature)


def sampled(p: Run, b: Body, ours: Model, theirs, batch: int, n: int, temperature: float) -> Row:
    """n tokens after each of `batch` prompts of 32."""
    name = f"{b}, batch {batch}, {n} tokens" + (f", temperature {temperature:g}" if temperature else "")
    progress("sampling", name)
    prompts, said = b.prompts(batch, 32), {}

    def say(generate, body, n: int) -> None:
        said[generate] = generate(body, prompts, n, temperature)

    e = engine(ours, batch, 32 + n + 1)
    sides = partial(say, generate_ours, e), partial(say, generate_theirs, theirs)
    for side in sides:
        side(4)  # to warm up
    spans = alternate(p, *(partial(side, n) for side in sides))
    note = "" if temperature else agreement(theirs, prompts, *said.values()) + "; "
    limit = batch * n / products_alone(ours, batch, 32, n)
    return versus(name, spans, batch * n, f"{note}products alone: {limit:,.0f} tok/s")


@torch.inference_mode()
def agreement(theirs, prompts: list[list[int]], a: list[list[int]], b: list[list[int]]) -> str:
    """Share of equal ids; if rows differ, how close the logits of the two ids are at the first difference.

    In rounding steps (ulps) of the logits: a sum in another order may move by a few.
    """
    equal = sum(x == y for p, q in zip(a, b) for x, y in zip(p, q)) / sum(map(len, a))
    if equal == 1:
        return "greedy ids equal"
    gaps = []
    for prompt, p, q in zip(prompts, a, b):
        if p != q:
            i = next(i for i, (x, y) in enumerate(zip(p, q)) if x != y)
            z = theirs(torch.tensor([prompt + q[:i]], device=DEVICE)).logits[0, -1].float()
            step = 2.0 ** math.floor(math.log2(z[q[i]].abs().item())) * torch.finfo(theirs.dtype).eps
            gaps.append((z[q[i]] - z[p[i]]).abs().item() / step)
    return f"{equal:.1%} of greedy ids equal; first differences within {max(gaps):.0f} steps of rounding"


@torch.inference_mode()
def products_alone(body: Model, batch: int, fed: int, sampled: int) -> float:
    """Seconds of the matmuls alone, for `batch` rows with `fed` prompt tokens and `sampled` tokens each."""

    def seconds(tokens: int, head: bool) -> float:
        def multiply() -> None:
            for linear in body.linears():
                linear(x[linear.d_in], None)
            if head:
                body.logits(x[body.config.d])

        widths = {linear.d_in for linear in body.linears()}
        x = {n: torch.randn(tokens, n, dtype=body.dtype, device=DEVICE) for n in widths}
        return min(timed(multiply) for _ in range(3))

    return seconds(batch * fed, head=False) + sampled * seconds(batch, head=True)


def episodes(p: Run) -> Iterator[Row]:
    """Whole episodes. Theirs: in lock step, without adapters. Ours: continuously batched, with the adapters
    of both roles, and again without adapters."""
    for b in p.bodies(torch.bfloat16):
        w = p.few(SMALL, Workload() if b == Body() else Workload(group=4))
        name = f"{b}, {w.questions} questions x {w.group}"
        if not installed("transformers"):
            yield absent(name)
            continue
        bodies = {name: work.with_roles(b.ours(w.context + 1)), f"{name}, no adapters": b.ours(w.context + 1)}
        engines, theirs = {kind: w.engine(body) for kind, body in bodies.items()}, b.theirs()
        with threads(b.threads):
            for e in engines.values():
                generate_ours(e, [[1, 2, 3]], 2, 1.0)  # to warm up
            generate_theirs(theirs, [[1, 2, 3]], 2, 1.0)
            progress("episodes", name)
            calls = [partial(w.act, e) for e in engines.values()]
            *ours, peers = alternate(p, *calls, partial(lock_step, theirs, w))
        for (kind, e), spans in zip(engines.items(), ours):
            s = e.stats
            note = f"{s.decoded:,} tokens sampled, {s.prefilled:,} fed and {s.shared:,} shared by ours"
            yield versus(kind, (spans, peers), w.decoded(), note)


def lock_step(theirs, w: Workload) -> int:
    """As in the paper's code: each turn prefills the whole history again and waits for its slowest row; then
    all documents are written in one batch. Returns the number of tokens of all episodes."""
    histories = [w.ids(0, row // w.group, n=w.prompt) for row in range(w.rows)]
    for call in range(w.turns):
        lengths = [w.lengths(row)[call] for row in range(w.rows)]
        sampled = [s[:n] for s, n in zip(generate_theirs(theirs, histories, max(lengths), 1.0), lengths)]
        histories = [h + s for h, s in zip(histories, sampled)]
        if call + 1 < w.turns:
            orders = [w.ids(1, n=w.order) + s for s in sampled]
            documents = generate_theirs(theirs, orders, w.documents, 1.0)
            histories = [h + d for h, d in zip(histories, documents)]
    return sum(map(len, histories))


PARTS = {
    "products": (models, "product"),
    "adapters": (models, "adapt"),
    "attention": (kernels, "cached_attention"),
    "RMSNorm": (kernels, "rms_norm"),
    "RoPE and cache": (kernels, "rope_cache"),
    "SwiGLU": (kernels, "swiglu"),
    "sampling": (kernels, "sample"),
}


def profile(p: Run) -> Iterator[Row]:
    """Where our time goes, by timers around the kernels' functions. The rest is Python, small operations and
    the timers themselves."""
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
        call = partial(w.act, w.engine(work.with_roles(Body().ours(w.context + 1))))
        yield shares(f"{Body()}, episodes, {w.questions} questions x {w.group}", call, 1)


def shares(name: str, call: Callable[[], object], steps: int) -> Row:
    """The row of a call: milliseconds per step without timers, and the share of each of PARTS with them."""
    progress("profile", name)
    call()
    plain, spent = min(timed(call) for _ in range(2)), dict.fromkeys(PARTS, 0.0)

    def clock(part: str, f: Callable, *args, **kwargs):
        began = timing.clock()
        out = f(*args, **kwargs)
        spent[part] += timing.clock() - began
        return out

    with ExitStack() as stack:
        for part, (module, f) in PARTS.items():
            stack.enter_context(patch.object(module, f, partial(clock, part, getattr(module, f))))
        whole = timed(call)
    spent["the rest"] = whole - sum(spent.values())
    note = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in spent.items() if seconds)
    return Row(name, f"{1e3 * plain / steps:,.3g} ms", note=note)
