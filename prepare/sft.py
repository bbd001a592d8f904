"""Supervised fine-tuning of one role's adapter on prompts and completions (ZeroSearch, arXiv 2505.04588).

Only the completion is trained, batches hold rows of similar length, and the order comes from a seed, so that
an interrupted run resumes exactly.

Not a Trainer: `fine_tune` is a generator of progress, and its caller (command.py) saves the results.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo import NOT_FINITE, cut
from kernels import linear_logp
from model import SIMULATOR, Model
from prepare.rows import row_query
from simulator import prompt
from tokenizer import Tokenizer
from words import SimWords


@dataclass(frozen=True)
class Example:
    """A row as ids, and a mask: 1 for what is to be learnt (a simulator's documents, a policy's turns)."""

    ids: list[int]
    mask: list[int]


def steps_of(
    rows: list[dict], encode: Callable[[dict], Example], tokens: int, seed: int
) -> Iterator[list[Example]]:
    """An endless stream of steps of up to `tokens` tokens (or one longer row), reshuffled each epoch.

    Rows are encoded when their turn comes, so that a large set costs nothing at the start.
    """
    order, step, size = random.Random(seed), [], 0
    while True:
        for row in order.sample(rows, len(rows)):
            new = encode(row)
            if step and size + len(new.ids) > tokens:
                yield step
                step, size = [], 0
            step, size = [*step, new], size + len(new.ids)


def batches(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Examples sorted by length, in micro-batches (see `cut`). In the toy task 4 % of one is padding;
    unsorted it would be half."""
    rows = sorted(examples, key=lambda e: len(e.ids))
    return [rows[some] for some in cut([len(e.ids) for e in rows], tokens)]


def completion_logps(model: Model, role: int, batch: list[Example]) -> Tensor:
    """Log-probabilities (N,) of a batch's tokens to be learnt, fp32, differentiable in the role's adapter."""
    ids, mask = (
        pad_sequence([torch.tensor(x) for x in xs], batch_first=True).to(model.device)  # (B, T)
        for xs in ([e.ids for e in batch], [e.mask for e in batch])
    )
    T, context = ids.size(1), model.config.context
    if context < T:
        raise ValueError(f"a row has {T} tokens, this body reads {context}: shorten it")
    lengths, mask = torch.tensor([len(e.ids) for e in batch], device=model.device), mask[:, 1:].bool()
    h = model(ids, role, lengths, chosen=F.pad(mask, (0, 1)))  # (N, d)
    return linear_logp(h, model.head, ids[:, 1:][mask])[0]


@torch.no_grad()
def held_out_loss(model: Model, role: int, examples: list[Example], tokens: int) -> float:
    """Mean negative log-probability of the completion tokens of all examples, in nats."""
    logps = [completion_logps(model, role, batch) for batch in batches(examples, tokens)]
    return -torch.cat(logps).mean().item()


def backward(model: Model, role: int, step: list[Example], tokens: int) -> float:
    """Add the gradient of a step's mean loss, batch by batch (the same for any `tokens`). The loss."""
    n, loss = sum(sum(e.mask) for e in step), 0.0
    for batch in batches(step, tokens):
        part = -completion_logps(model, role, batch).sum() / n
        part.backward()
        loss += part.item()
    return loss


@dataclass(frozen=True)
class Progress:
    """After `step` of `steps`: losses in nats a completion token, rate in tokens a second, seconds left."""

    step: int
    steps: int
    loss: float
    held: float | None  # of the held-out rows, at the steps at which it was measured
    rate: float
    left: float

    def __str__(self):
        held = "" if self.held is None else f"   held-out {self.held:.3f}"
        pace = f"{self.rate:,.0f} tokens/s   {self.left:.0f} s left"
        return f"sft {self.step:4d}/{self.steps}   loss {self.loss:.3f}{held}   {pace}"


def adamw(model: Model, role: int) -> torch.optim.AdamW:
    """The optimiser of a role's adapter. No weight decay: the adapter starts at the base, B = 0."""
    return torch.optim.AdamW([model.adapter(role)], weight_decay=0.0)


def fine_tune(
    model: Model,
    role: int,
    rows: list[dict],
    encode: Callable[[dict], Example],
    steps: int,
    lr: float,
    tokens: int = 4096,
    every: int = 50,
    seed: int = 0,
    micro: int = 1024,
    optimizer: torch.optim.Optimizer | None = None,
    done: int = 0,
    exam: list[dict] = (),
) -> Iterator[Progress]:
    """Fine-tune a role's adapter on rows: a generator of one Progress a step (iterate to run it).

    AdamW on `model.adapter(role)`, lr falling linearly to 0, about `tokens` tokens a step, at most `micro`
    (padding included) a pass. exam: held-out rows, whose loss is measured after the first step, every `every`
    steps and at the end. done: steps that `optimizer` and the adapter have behind them. A step whose gradient
    is not finite is skipped. Raises ValueError where three are in a row, and for a row longer than the body's
    context.
    """
    exam = [encode(row) for row in exam]
    optimizer = optimizer or adamw(model, role)
    began, seen, skipped = time.monotonic(), 0, 0
    for step, drawn in zip(range(1, steps + 1), steps_of(rows, encode, tokens, seed)):
        if step <= done:
            continue
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        loss = backward(model, role, drawn, micro)
        sound = torch.nn.utils.clip_grad_norm_(model.adapter(role), 1.0).isfinite()
        skipped = 0 if sound else skipped + 1
        if skipped == 3:
            raise ValueError(f"steps {step - 2} to {step} were skipped, {NOT_FINITE}")
        if sound:
            optimizer.step()
        optimizer.zero_grad()
        seen += sum(len(e.ids) for e in drawn)
        measured = exam and (step in (1, steps) or step % every == 0)
        exam_loss = held_out_loss(model, role, exam, micro) if measured else None
        spent = time.monotonic() - began
        left = spent / (step - done) * (steps - step)
        yield Progress(step, steps, loss, exam_loss, seen / spent, left)


# --------------------------------------------------------------------------------------- the simulator's rows


def end_of_turn(tok: Tokenizer) -> int:
    """The id that ends an assistant's turn in the chat template; without one, the lowest that ends a text."""
    turns = tok.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return ([i for i in turns if i in tok.eos] or [min(tok.eos)])[-1]


def example(tok: Tokenizer, words: SimWords, end: int, row: dict) -> Example:
    """A row's prompt, made as in sampling, then its documents, then the id `end` that ends a turn."""
    asked = prompt(tok, words, row_query(row), row["quality"] == "noisy")
    said = [*tok.encode(row["documents"]), end]
    return Example(asked + said, [0] * len(asked) + [1] * len(said))


def sft(
    model: Model, tok: Tokenizer, words: SimWords, rows: list[dict], steps: int, lr: float, **options
) -> Iterator[Progress]:
    """Fine-tune the simulator's adapter on rows (`read_rows`); options are those of `sft.fine_tune`."""
    encode = partial(example, tok, words, end_of_turn(tok))
    return fine_tune(model, SIMULATOR, rows, encode, steps, lr, **options)
