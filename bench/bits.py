"""A real checkpoint in 8 and 4 bits: nats a token, greedy agreement, memory, and speed on this machine."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

import kernels
import weights
from model import REFERENCE, Model
from search import passage, read_lines
from tokenizer import Tokenizer

from .timing import Row, Run, absent, progress, versus
from .work import DEVICE, README, Body, engine, generate_ours, generate_theirs, installed, threads

KINDS = {"fp32": (torch.float32, 0), "bf16": (torch.bfloat16, 0)}
KINDS |= {f"{n} bits": (torch.float32, n) for n in (8, 4)}


def bits(p: Run) -> Iterator[Row]:
    """A checkpoint in bf16, and with its frozen matrices in 8 and 4 bits of an fp32 body, on the first tokens
    of every so many passages of --corpus (or this README), against fp32. Then greedy sampling with 8 bits by
    our engine, against our fp32 and transformers' fp32: tokens a second of this process's CPU time."""
    for b in p.bodies(torch.float32)[-1:]:  # the checkpoint, or the toy body without one
        yield from quality(p, b)
        yield from speed(p, b)


def quality(p: Run, b: Body) -> Iterator[Row]:
    """Held-out nats a token, and the share of next tokens that are the same as in fp32, greedily."""
    tok, n = Tokenizer.load(b.home), p.few(2, 48)
    texts = [": ".join(one) for one in read_lines(p.corpus, passage)] if p.corpus else [README.read_text()]
    rows = [tok.encode(text)[:256] for text in texts[:: max(1, len(texts) // n)][:n]]
    nats, greedy, size = {}, {}, {}
    for kind, (dtype, bits) in KINDS.items():
        progress("bits", kind)
        body = weights.load(b.home, dtype, DEVICE, bits)
        size[kind] = sum(x.weight.nbytes for x in body.linears())
        with threads(b.threads):
            nats[kind], greedy[kind] = read(body, rows)
        same = (greedy[kind] == greedy["fp32"]).float().mean().item()
        shown = f"{nats[kind]:.4f} nats", f"{nats['fp32']:.4f} nats"
        note = (
            f"{same:.1%} of the next tokens as in fp32; matrices {size[kind] / size['fp32']:.2f} of its bytes"
        )
        yield Row(f"{b.name} {kind}, {len(greedy[kind]):,} tokens", *shown, note=note)


@torch.no_grad()
def read(body: Model, rows: list[list[int]]) -> tuple[float, torch.Tensor]:
    """Mean nats a token of rows, and the most likely next tokens (N,)."""
    logps, greedy = [], []
    for row in rows:
        ids = torch.tensor([row], device=DEVICE)
        h = body(ids, REFERENCE)[0, :-1]
        logps.append(kernels.linear_logp(h, body.head, ids[0, 1:])[0])
        greedy.append((h @ body.head.T).argmax(-1))
    return -torch.cat(logps).double().mean().item(), torch.cat(greedy)


def cpu_time(call: Callable[[], object]) -> float:
    """Seconds that this process computed during a call: other programs on the machine do not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def speed(p: Run, b: Body) -> Iterator[Row]:
    """8 bits against both, alternating, after prompts of one token: n steps of `batch` rows."""
    ours, plain = weights.load(b.home, b.dtype, DEVICE, 8), b.ours()
    theirs = b.theirs() if installed("transformers") else None
    for batch, n in p.few(((1, 4), (3, 4)), ((1, 32), (8, 8), (32, 6), (256, 3))):
        progress("bits", "sampling", batch)
        prompts = b.prompts(batch, 1)
        sides = [partial(generate_ours, engine(body, batch, n + 2), prompts) for body in (ours, plain)]
        names = ["our fp32"]
        if theirs and batch <= 8:
            sides, names = [*sides, partial(generate_theirs, theirs, prompts)], [*names, "transformers' fp32"]
        with threads(b.threads):
            for side in sides:
                side(2, 0.0)  # to warm up
            spans = [[cpu_time(partial(side, n, 0.0)) for side in sides] for _ in range(p.few(1, 3))]
        mine, *others = map(list, zip(*spans))
        for name, spans in zip(names, others):
            yield versus(f"{b.name} 8 bits against {name}, batch {batch}", (mine, spans), batch * n)
    if theirs is None:
        yield absent(b.name)
