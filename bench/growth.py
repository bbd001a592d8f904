"""How time and memory grow with the work, and how much memory a vocabulary takes."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import grpo
from cli import plan
from engine import Engine
from kernels import linear_logp
from model import POLICY, SIMULATOR, Config, Model
from rollout import Episode, Turn

from .timing import Row, Run, alternate, grows, median_of, metered, now, progress, timed, versus
from .work import SHORT, Body, Lesson, Workload, engine, learner, random_body, threads, with_roles

TINY = Config("qwen2", vocab=64, d=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=64, context=128)


def growth(p: Run) -> Iterator[Row]:
    """How costs grow: an exponent of 0 is flat, an exponent of 1 is linear."""
    with threads(1):
        body = with_roles(Body().ours(2048))
        for part in (history, turns, siblings, vocabulary, waiting):
            progress("growth", part.__name__)
            yield from part(p, body)


class Enough(Exception):
    """Raised when every span is measured: the episodes still waiting need not run."""


def turn_seconds(e: Engine, rows: int, history: int, feed: int, decode: int, waiting: int = 0) -> float:
    """Seconds of one turn of `rows` siblings with a history: `feed` tokens are fed, `decode` sampled.

    waiting: further episodes, which wait for a seat (the engine then has `rows` seats).
    """
    spans, w = [], Workload(vocab=e.pools[POLICY].model.config.vocab)

    def one(row: int) -> Episode:
        context = object()
        yield Turn(w.ids(0, n=history), POLICY, 1, 1.0, (), (0, row, 0), context)
        began = now()
        yield Turn(w.ids(row, n=feed), POLICY, decode, 1.0, (), (0, row, 1), context)
        spans.append((began, now()))
        if len(spans) == rows:
            raise Enough

    with suppress(Enough):
        e.run([one(row) for row in range(rows + waiting)])
    return max(end for _, end in spans) - min(began for began, _ in spans)


def history(p: Run, body: Model) -> Iterator[Row]:
    sizes, n = p.few([16, 32], [128, 256, 512, 1024]), p.few(4, 32)
    e = engine(body, 8, sizes[-1] + 70)
    spans = [median_of(p, partial(turn_seconds, e, 8, size, n, n)) for size in sizes]
    yield grows(f"a turn (8 rows, {n} tokens fed, {n} sampled): history", sizes, spans, "seconds")


def waiting(p: Run, _: Model) -> Iterator[Row]:
    """Should be flat: a decode step must not depend on the episodes that wait for a seat."""
    sizes, n = p.few([20, 200], [100, 1000, 10000]), p.few(4, 64)
    e = engine(random_body(TINY, torch.float32, "cpu"), 8, n + 8)
    spans = [median_of(p, partial(turn_seconds, e, 8, 2, 0, n, size)) / n for size in sizes]
    yield grows("a decode step (8 rows, a tiny body): episodes waiting for a seat", sizes, spans, "seconds")


def both(p: Run, time: str, peak: str, of: str, sizes: list[int], calls: list, against=()) -> Iterator[Row]:
    """The rows of the time and of the peak memory of calls that do more and more of something."""
    spans = [median_of(p, partial(timed, call)) for call in calls]
    yield grows(f"{time}: {of}", sizes, spans, "seconds", against)
    yield grows(f"{peak}: {of}", sizes, [metered(call).peak for call in calls], "bytes", against)


def turns(p: Run, body: Model) -> Iterator[Row]:
    sizes = p.few([2, 3], [2, 4, 8, 16])
    works = [Workload(2, 4, 64, n, 12, 12, 12, 32, body.config.vocab) for n in sizes]
    e = engine(body, 14, works[-1].context + 1, (POLICY, SIMULATOR))
    names = "episodes (8 rows), exponent in tokens sampled", "their peak beyond the cache", "turns"
    yield from both(p, *names, sizes, [partial(w.act, e) for w in works], [w.decoded() for w in works])


def siblings(p: Run, body: Model) -> Iterator[Row]:
    sizes, lengths = p.few([2, 4], [4, 8, 16, 32]), p.few((4, 8, 8), (16, 48, 64))
    works = [Workload(1, group, 64, 2, *lengths, 32, body.config.vocab) for group in sizes]
    acts = [partial(w.act, w.engine(body)) for w in works]
    yield grows("acting: siblings", sizes, [median_of(p, partial(timed, act)) for act in acts], "seconds")
    learns = [learner(body, act(), group, 1024) for act, group in zip(acts, sizes)]
    yield from both(p, "learning", "its peak (micro-batches of 1,024 tokens)", "siblings", sizes, learns)


def logp_call(f: Callable, n: int, d: int, vocab: int) -> Callable[[], None]:
    """Log-probs of n tokens by f, and the gradient of their sum."""
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(n, d, generator=g), torch.randn(vocab, d, generator=g)
    targets = torch.randint(vocab, (n,), generator=g)
    return lambda: f(h.detach().requires_grad_(), W, targets)[0].sum().backward()


def vocabulary(p: Run, _: Model) -> Iterator[Row]:
    sizes = p.few([1024, 2048], [8192, 32768, 65536, 151936])
    calls = [logp_call(linear_logp, p.few(64, 512), 64, size) for size in sizes]
    yield from both(p, "log-prob and gradient (512 tokens)", "its peak", "vocabulary", sizes, calls)


def naive_logp(h: Tensor, W: Tensor, targets: Tensor) -> tuple[Tensor]:
    """The usual way: all logits, and log_softmax over them."""
    return (torch.log_softmax((h @ W.T).float(), -1).gather(1, targets[:, None])[:, 0],)


def memory(p: Run) -> Iterator[Row]:
    """No tensor is as wide as the vocabulary: peak memory of the fused log-prob against plain log_softmax,
    and the largest tensor of a training step."""
    vocab, n, d = p.few((2048, 64, 32), (151936, 1024, 128))
    progress("memory", "log-prob")
    calls = [logp_call(f, n, d, vocab) for f in (linear_logp, naive_logp)]
    peaks = [metered(call).peak for call in calls]
    name = f"log-prob and gradient, {n} tokens, V = {vocab:,}"
    shown = (f"{peak / 2**20:,.1f} MiB" for peak in peaks)
    yield Row(f"{name}: peak", *shown, peaks[1] / peaks[0], note="against log_softmax over all logits")
    yield versus(f"{name}: time", alternate(p, *calls))
    progress("memory", "largest tensor of a step")
    body = Model(replace(plan.shape("tiny"), vocab=vocab)).init(0)
    body.add_role(POLICY)
    lesson = p.few(SHORT, Lesson())
    ts = lesson.trajectories(vocab)
    meter = metered(learner(body, ts, lesson.group, 1024))
    logits = max(b.w.numel() for b in grpo.make_batches(ts, [1.0] * len(ts), 1024)) * vocab * 4
    shown = (f"{meter.largest / 2**20:.2f} MiB {meter.largest_shape}", f"{logits / 2**20:,.2f} MiB")
    name = f"largest tensor of a step, toy body with V = {vocab:,}"
    yield Row(name, *shown, logits / meter.largest, note="against the logits of its largest micro-batch")
