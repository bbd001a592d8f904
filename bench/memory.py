"""No tensor is as wide as the vocabulary: peak memory of the fused log-prob against plain log_softmax, and
the largest tensor of a training step."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import grpo
from cli import plan
from kernels import linear_logp
from model import POLICY, Model

from .growth import logp_call
from .timing import Row, Run, alternate, metered, progress, versus
from .work import SHORT, Lesson, learner


def naive_logp(h: Tensor, W: Tensor, targets: Tensor) -> tuple[Tensor]:
    """The usual way: all logits, and log_softmax over them."""
    return (torch.log_softmax((h @ W.T).float(), -1).gather(1, targets[:, None])[:, 0],)


def rows(p: Run) -> Iterator[Row]:
    vocab, n, d = p.few((2048, 64, 32), (151936, 1024, 128))
    progress("memory", "log-prob")
    calls = [logp_call(f, n, d, vocab) for f in (linear_logp, naive_logp)]
    peaks = [metered(call).peak for call in calls]
    name = f"log-prob and gradient, {n} tokens, V = {vocab:,}"
    shown = (f"{peak / 2**20:,.1f} MiB" for peak in peaks)
    yield Row(f"{name}: peak", *shown, peaks[1] / peaks[0], note="against log_softmax over all logits")
    yield versus(f"{name}: time", alternate(p, *calls))
    yield largest_tensor(p, vocab)


def largest_tensor(p: Run, vocab: int) -> Row:
    progress("memory", "largest tensor of a step")
    body = Model(replace(plan.shape("tiny"), vocab=vocab)).init(0)
    body.add_role(POLICY)
    lesson = p.few(SHORT, Lesson())
    ts = lesson.trajectories(vocab)
    meter = metered(learner(body, ts, lesson.group, 1024))
    logits = max(b.w.numel() for b in grpo.make_batches(ts, [1.0] * len(ts), 1024)) * vocab * 4
    shown = (f"{meter.largest / 2**20:.2f} MiB {meter.largest_shape}", f"{logits / 2**20:,.2f} MiB")
    name = f"largest tensor of a step, toy body with V = {vocab:,}"
    return Row(name, *shown, logits / meter.largest, note="against the logits of its largest micro-batch")
