"""Sampling by our engine and by transformers' `generate`: greedy, and one row at temperature 1. "Products
alone" is the rate if only the matmuls of prompts and sampled tokens took time. On a CPU that multiplies bf16
more slowly than fp32, our engine uses fp32 copies of the matrices from 16 rows on, for three times the memory
of the weights."""

import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch

from model import Model

from .timing import Row, Run, absent, alternate, progress, timed, versus
from .work import DEVICE, Body, engine, generate_ours, generate_theirs, installed, threads


def rows(p: Run) -> Iterator[Row]:
    batches, lengths = p.few((1, 3), (1, 8, 32)), p.few((8,), (64, 256))
    for b in p.bodies(torch.float32, torch.bfloat16):
        if not installed("transformers"):
            yield absent(str(b))
            continue
        ours, theirs = b.ours(), b.theirs()
        for batch, n in itertools.product(batches, lengths):
            for temperature in (0.0, 1.0) if (batch, n) == (batches[-1], lengths[0]) else (0.0,):
                with threads(b.threads):
                    yield sampling(p, b, ours, theirs, batch, n, temperature)


def sampling(p: Run, b: Body, ours: Model, theirs, batch: int, n: int, temperature: float) -> Row:
    """n tokens after each of `batch` prompts of 32."""
    name = f"{b}, batch {batch}, {n} tokens" + (f", temperature {temperature:g}" if temperature else "")
    progress("sampling", name)
    prompts, said = b.prompts(batch, 32), {}

    def say(generate, body, n: int) -> None:
        said[generate] = generate(body, prompts, n, temperature)

    sides = (
        partial(say, generate_ours, engine(ours, batch, 32 + n + 1)),
        partial(say, generate_theirs, theirs),
    )
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
