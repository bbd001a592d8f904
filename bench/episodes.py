"""Whole episodes. Theirs: in lock step, without adapters. Ours: continuously batched, with the adapters of
both roles, and again without adapters."""

from collections.abc import Iterator
from functools import partial

import torch

from .timing import Row, Run, absent, alternate, progress, versus
from .work import SMALL, Body, Workload, generate_ours, generate_theirs, installed, threads, with_roles


def rows(p: Run) -> Iterator[Row]:
    for b in p.bodies(torch.bfloat16):
        w = p.few(SMALL, Workload() if b == Body() else Workload(group=4))
        name = f"{b}, {w.questions} questions x {w.group}"
        yield from episodes(p, name, b, w) if installed("transformers") else [absent(name)]


def episodes(p: Run, name: str, b: Body, w: Workload) -> Iterator[Row]:
    bodies = {name: with_roles(b.ours(w.context + 1)), f"{name}, no adapters": b.ours(w.context + 1)}
    engines, theirs = {kind: w.engine(body) for kind, body in bodies.items()}, b.theirs()
    with threads(b.threads):
        for engine in engines.values():
            generate_ours(engine, [[1, 2, 3]], 2, 1.0)  # to warm up
        generate_theirs(theirs, [[1, 2, 3]], 2, 1.0)
        progress("episodes", name)
        calls = [partial(w.act, engine) for engine in engines.values()]
        *ours, peers = alternate(p, *calls, partial(lock_step, theirs, w))
    for (kind, engine), spans in zip(engines.items(), ours):
        s = engine.stats
        note = f"{s.decoded:,} tokens sampled, {s.prefilled:,} fed and {s.copied:,} copied by ours"
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
