"""How fast, how small, and beside what: every figure of this repository, measured in one run.

    python bench.py                                   all that this machine can run, with the toy body
    python bench.py --checkpoint DIR                  and with a real one (a small one, without a GPU)
    python bench.py --only sampling,memory --write    some sections; --write puts them into BENCH.md
    python bench.py --quick                           the same code in seconds: a smoke run, no figures
    python bench.py --plan 3b --memory 24             what would fit into 24 GiB, and with which settings

A row is a ratio: ours and theirs take turns in the same run, with the same checkpoint, prompts, type, threads
and number of tokens; the figures are medians, and the ratios' spread is beside them. The peers (transformers'
`generate`, TRL's GRPOTrainer with PEFT) come from requirements-bench.txt; without them a row says so.

What this is not: a test. tests/test_bench.py sees that it runs and that its arithmetic is right.
"""

import argparse
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import grpo
import kernels
import model as models
import plan
from kernels import linear_logp
from kernels.tools import measure
from model import POLICY, SIMULATOR, Cache, Config, Model
from rollout import DOCUMENTS, TOKENS, Engine, Episode, Question, Trajectory, Turn
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
DEVICE = models.machine(None, None)[0]  # of ours and theirs

# ------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
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


HEADS = ("", "ours", "theirs", "ratio", "spread", "")


@dataclass(frozen=True)
class Run:
    """How to run. checkpoint: a directory, or "" for the toy body alone."""

    checkpoint: str = ""
    quick: bool = False
    threads: int = 1
    seconds: float = 20.0  # for the repetitions of one row, of which there are 2 at least

    def few(self, quick, full):
        return quick if self.quick else full


def progress(*words: object) -> None:
    """Where we are, for whoever watches: on stderr, so that stdout is the table alone."""
    print("...", *words, file=sys.stderr, flush=True)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's work included."""
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(p: Run, *calls: Callable) -> tuple[list[float], ...]:
    """Seconds of each call, in turn: 2 to 7 times each, as `p.seconds` allows (once in a smoke run)."""
    spans: tuple[list[float], ...] = tuple([] for _ in calls)
    least, most = p.few((1, 1), (2, 7))
    began = time.perf_counter()
    while len(spans[0]) < least or (len(spans[0]) < most and time.perf_counter() - began < p.seconds):
        for span, call in zip(spans, calls):
            span.append(timed(call))
    return spans


def versus(name: str, spans: tuple[list[float], list[float]], tokens: int = 0, note: str = "") -> Row:
    """The row of two lists of seconds; with `tokens` the columns are tokens a second."""
    ours, theirs = (statistics.median(s) for s in spans)
    ratios = [b / a for a, b in zip(*spans)]
    shown = [f"{tokens / s:,.0f} tok/s" if tokens else f"{s:.3g} s" for s in (ours, theirs)]
    return Row(name, *shown, statistics.median(ratios), (min(ratios), max(ratios)), note)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The b of the power law a x^b that fits best on logarithmic paper."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grows(name: str, sizes: list[int], values: list[float], unit: str, against: list[int] = ()) -> Row:
    """The row of something that grows with `sizes` (or with what stands behind them): values, exponent."""
    scale, unit = (2**20, "MiB") if unit == "bytes" else (1e-3, "ms")
    shown = " ".join(f"{v / scale:.3g}" for v in values) + f" {unit}"
    name += f" {', '.join(map(str, sizes))}"
    return Row(name, shown, ratio=exponent(against or sizes, values), note="exponent")


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it: what lives, its peak, the largest one.

    It sees every operation of this thread on any device (meta too, where nothing is computed), the backward
    pass included, but not what an operation allocates for itself and frees, nor packed copies (oneDNN's own).
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.largest_shape: tuple[int, ...] = ()
        self.known: set[int] = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in self.tensors((args, kwargs))}
        out = f(*args, **(kwargs or {}))
        for x in self.tensors(out):
            if x.untyped_storage()._cdata not in before:
                self.see(x)
        return out

    @staticmethod
    def tensors(tree: object) -> Iterator[Tensor]:
        return (x for x in tree_iter(tree) if isinstance(x, Tensor) and not x.is_mkldnn)

    def see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        if size > self.largest:
            self.largest, self.largest_shape = size, tuple(x.shape)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def metered(call: Callable[[], object]) -> Meter:
    """The meter of one call."""
    with Meter() as meter:
        call()
    return meter


def resident() -> tuple[int, int]:
    """This process's resident bytes and their peak since `forget_peak`; zeros where there is no /proc."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else "VmRSS: 0 kB VmHWM: 0 kB"
    return tuple(int(re.search(rf"{key}:\s*(\d+) kB", text)[1]) * 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak() -> int:
    """Start to look for the peak of memory; returns the bytes held now, on the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return resident()[0]


def peak() -> int:
    """Peak bytes since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident()[1]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with n threads, ours and theirs alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------- bodies and prompts


class Silent:
    """A tokenizer to which no token ends anything: without stops, every turn runs to its limit."""

    eos: frozenset[int] = frozenset()

    def token_bytes(self, i: int) -> bytes:
        return b""

    def decode(self, ids: list[int]) -> str:
        return ""


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def absent(name: str) -> Row:
    return Row(name, "", "peer not installed", note="pip install -r requirements-bench.txt")


@contextmanager
def stretched(home: str | Path, context: int) -> Iterator[Path]:
    """The same checkpoint in a directory whose config.json allows `context` positions."""
    with tempfile.TemporaryDirectory() as other:
        for file in models.resolve(home).iterdir():
            (Path(other) / file.name).symlink_to(file)
        config = models.read_json(Path(other) / "config.json", "a checkpoint")
        config["max_position_embeddings"] = max(context, config["max_position_embeddings"])
        (Path(other) / "config.json").unlink()
        (Path(other) / "config.json").write_text(json.dumps(config))
        yield Path(other)


def transformers_body(home: str | Path, dtype: torch.dtype):
    """transformers' model of a checkpoint, as it comes (sdpa, a growing cache), but with no end of a text."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    theirs = AutoModelForCausalLM.from_pretrained(str(home), dtype=dtype).to(DEVICE).eval()
    theirs.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return theirs


def prompts(home: str | Path, count: int, length: int) -> list[list[int]]:
    """`count` different prompts (ids) of `length` tokens: stretches of this repository's README."""
    ids = Tokenizer.load(home).encode((HERE / "README.md").read_text(encoding="utf-8"))
    rng = random.Random(0)
    return [ids[i : i + length] for i in (rng.randrange(len(ids) - length) for _ in range(count))]


# -------------------------------------------------------------------------------------------------- sampling


def generate_ours(engine: Engine, rows: list[list[int]], n: int, temperature: float) -> list[list[int]]:
    """n tokens after each prompt."""

    def one(i: int, ids: list[int]) -> Episode:
        return (yield Turn(ids, POLICY, n, temperature, (), (0, i, TOKENS))).ids

    return engine.run([one(i, ids) for i, ids in enumerate(rows)])


@torch.inference_mode()
def generate_theirs(theirs, rows: list[list[int]], n: int, temperature: float) -> list[list[int]]:
    """The same by transformers; prompts of unlike lengths are padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=DEVICE)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=n, **how)
    assert out.size(1) == longest + n, "transformers stopped early: the lengths are not forced"
    return out[:, longest:].tolist()


@torch.inference_mode()
def agreement(theirs, rows: list[list[int]], a: list[list[int]], b: list[list[int]]) -> str:
    """Share of equal ids; where rows part, how near a tie their first difference is.

    The tie is in steps of the type at the height of the logits: the same sum in another order moves by some.
    """
    equal = sum(x == y for p, q in zip(a, b) for x, y in zip(p, q)) / sum(map(len, a))
    if equal == 1:
        return "greedy ids equal"
    gaps = []
    for row, p, q in zip(rows, a, b):
        if p != q:
            i = next(i for i, (x, y) in enumerate(zip(p, q)) if x != y)
            z = theirs(torch.tensor([row + q[:i]], device=DEVICE)).logits[0, -1].float()
            height = 2.0 ** math.floor(math.log2(z[q[i]].abs().item()))
            step = height * torch.finfo(theirs.dtype).eps
            gaps.append((z[q[i]] - z[p[i]]).abs().item() / step)
    return f"{equal:.1%} of greedy ids equal; rows part at {max(gaps):.0f} steps of the type at most"


@torch.inference_mode()
def products_alone(body: Model, rows: int, fed: int, sampled: int) -> float:
    """Seconds of the matrix products of so many rows' prompts and tokens: with nothing else, a limit."""

    def seconds(tokens: int, head: bool) -> float:
        x = {
            n: torch.randn(tokens, n, dtype=body.dtype, device=DEVICE)
            for n in (linear.d_in for linear in linears)
        }

        def multiply():
            for linear in linears:
                linear(x[linear.d_in], None)
            if head:
                body.logits(x[body.config.d])

        return min(timed(multiply) for _ in range(3))

    linears = list(body.linears())
    return seconds(rows * fed, False) + sampled * seconds(rows, True)


def sampling(p: Run) -> Iterator[Row]:
    """The engine against `transformers.generate`: greedy, and at the end once at temperature 1. "Products
    alone" is what the matrix products of prompts and tokens would allow us, were there nothing else. Where a
    CPU multiplies bf16 more slowly than fp32, ours multiplies copies in fp32 from 16 rows on: three times the
    memory of the weights."""
    yield from sampling_of(p, "toy", models.PRESETS["tiny"], torch.float32, 1)
    if p.checkpoint:
        for dtype in (torch.float32, torch.bfloat16):
            yield from sampling_of(p, Path(p.checkpoint).name, p.checkpoint, dtype, p.threads)


def sampling_of(p: Run, name: str, home: str, dtype: torch.dtype, n_threads: int) -> Iterator[Row]:
    """The rows of one body and type."""
    kind = models.NAMES[dtype]
    if not installed("transformers"):
        yield absent(f"{name} {kind}")
        return
    batches, lengths, start = p.few((1, 3), (1, 8, 32)), p.few((8,), (64, 256)), 32
    ours, theirs = models.load(home, dtype, DEVICE), transformers_body(home, dtype)
    with threads(n_threads):
        for batch, n in itertools.product(batches, lengths):
            engine = Engine({POLICY: (ours, Silent())}, batch, start + n + 1)
            rows = prompts(home, batch, start)
            for temperature in (0.0, 1.0) if (batch, n) == (batches[-1], lengths[0]) else (0.0,):
                progress("sampling", name, kind, "batch", batch, "tokens", n, "temperature", temperature)
                said: dict[str, list[list[int]]] = {}

                def ours_says(n=n, engine=engine, rows=rows, t=temperature, said=said):
                    said["ours"] = generate_ours(engine, rows, n, t)

                def theirs_says(n=n, rows=rows, t=temperature, said=said):
                    said["theirs"] = generate_theirs(theirs, rows, n, t)

                ours_says(4), theirs_says(4)  # to warm up
                spans = alternate(p, ours_says, theirs_says)
                note = "" if temperature else agreement(theirs, rows, said["ours"], said["theirs"])
                limit = batch * n / products_alone(ours, batch, start, n)
                note = "; ".join(filter(None, (note, f"products alone: {limit:,.0f} tok/s")))
                how = ", temperature 1" if temperature else ""
                yield versus(f"{name} {kind}, batch {batch}, {n} tokens{how}", spans, batch * n, note)


# -------------------------------------------------------------------------------------------------- episodes


@dataclass(frozen=True)
class Workload:
    """Episodes of forced lengths, in tokens: a prompt, turns, and a simulator's documents between them."""

    questions: int = 4
    group: int = 8
    prompt: int = 200
    turns: int = 3
    shortest: int = 20
    longest: int = 100
    documents: int = 250
    order: int = 150  # the simulator's prompt, to which the query is added
    vocab: int = 512  # ids are drawn from 1..vocab-1

    @property
    def rows(self) -> int:
        return self.questions * self.group

    @property
    def context(self) -> int:
        """Tokens of the longest episode, or of the longest simulator's prompt and documents."""
        episode = self.prompt + self.turns * self.longest + (self.turns - 1) * self.documents
        return max(episode, self.order + self.longest + self.documents)

    def ids(self, *key: int, n: int) -> list[int]:
        rng = random.Random(str(key))
        return [rng.randrange(1, self.vocab) for _ in range(n)]

    def lengths(self, row: int) -> list[int]:
        rng = random.Random(row)
        return [rng.randint(self.shortest, self.longest) for _ in range(self.turns)]

    def decoded(self) -> int:
        """Tokens that all episodes sample, the simulator's too."""
        return sum(sum(self.lengths(r)) + (self.turns - 1) * self.documents for r in range(self.rows))


SMALL = Workload(2, 2, 20, 2, 2, 6, 8, 10)  # for a smoke run


def forced_episode(w: Workload, row: int) -> Episode:
    """One episode of the workload, of which the engine sees what it sees of `rollout.episode`."""
    t, lengths, fed = Trajectory(Question("", ())), w.lengths(row), 0
    t.add(w.ids(0, row // w.group, n=w.prompt))
    for call, length in enumerate(lengths):
        address = (0, 0, row // w.group, row % w.group, call)
        sampled = yield Turn(t.ids[fed:], POLICY, length, 1.0, (), (*address, TOKENS), t)
        t.add(sampled.ids, sampled.logps)
        fed = len(t.ids)
        if call + 1 < len(lengths):
            order = w.ids(1, n=w.order) + sampled.ids
            t.add((yield Turn(order, SIMULATOR, w.documents, 1.0, (), (*address, DOCUMENTS))).ids)
    return t


def lock_step(theirs, w: Workload) -> int:
    """The reference's way: each turn feeds the whole history again and waits for its slowest row; then all
    documents are written in one batch. Returns the tokens of all episodes."""
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


def two_roles(body: Model, rank: int = 16) -> Model:
    """Give a body adapters of both roles that are not zero."""
    for role in (POLICY, SIMULATOR):
        body.add_role(role, rank=rank)
        body.adapter(role).data.add_(1e-3)
    return body


def episodes(p: Run) -> Iterator[Row]:
    """Whole episodes: theirs in lock step, without adapters; ours in one batch, with those of both roles, and
    again without."""
    w = p.few(SMALL, Workload())
    yield from episodes_of(p, "toy fp32", models.PRESETS["tiny"], torch.float32, 1, w)
    if p.checkpoint:
        name = f"{Path(p.checkpoint).name} bf16"
        w = p.few(SMALL, Workload(group=4))
        yield from episodes_of(p, name, p.checkpoint, torch.bfloat16, p.threads, w)


def both_roles(body: Model, w: Workload) -> Engine:
    """An engine for the workload, with as many seats as train.py gives it."""
    return Engine({r: (body, Silent()) for r in (POLICY, SIMULATOR)}, 2 * w.rows, w.context + 1)


def act(engine: Engine, w: Workload) -> list[Trajectory]:
    """All episodes of the workload."""
    return engine.run([forced_episode(w, row) for row in range(w.rows)])


def episodes_of(
    p: Run, name: str, home: str, dtype: torch.dtype, n_threads: int, w: Workload
) -> Iterator[Row]:
    name += f", {w.questions} questions x {w.group}"
    if not installed("transformers"):
        yield absent(name)
        return
    with stretched(home, w.context + 1) as longer, threads(n_threads):
        body, theirs = two_roles(models.load(longer, dtype, DEVICE)), transformers_body(longer, dtype)
        engines = [both_roles(b, w) for b in (body, models.load(longer, dtype, DEVICE))]
        for engine in engines:
            generate_ours(engine, [[1, 2, 3]], 2, 1.0)  # to warm up
        generate_theirs(theirs, [[1, 2, 3]], 2, 1.0)
        progress("episodes", name)
        calls = [partial(act, engine, w) for engine in engines]
        *spans, peers = alternate(p, *calls, lambda: lock_step(theirs, w))
    s = engines[0].stats
    note = f"{s.decoded:,} tokens sampled, {s.prefilled:,} fed and {s.copied:,} copied by ours"
    for kind, span in zip(("", ", no adapters"), spans):
        yield versus(name + kind, (span, peers), w.decoded(), note)


# -------------------------------------------------------------------------------------------- where time goes

PARTS = {
    "products": (models, "product"),
    "adapters": (models, "adapt"),
    "attention": (kernels, "cached_attention"),
    "RMSNorm": (kernels, "rms_norm"),
    "RoPE and cache": (kernels, "rope_cache"),
    "SwiGLU": (kernels, "swiglu"),
    "sampling": (kernels, "sample"),
}


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds spent in each of PARTS while the block runs, by the CPU's clock."""
    spent, kept = dict.fromkeys(PARTS, 0.0), {part: getattr(*where) for part, where in PARTS.items()}

    def clock(part: str, *args, **kwargs):
        began = time.perf_counter()
        out = kept[part](*args, **kwargs)
        spent[part] += time.perf_counter() - began
        return out

    for part, (module, name) in PARTS.items():
        setattr(module, name, partial(clock, part))
    try:
        yield spent
    finally:
        for part, (module, name) in PARTS.items():
            setattr(module, name, kept[part])


def profile(p: Run) -> Iterator[Row]:
    """Where our time goes, by clocks around the kernels' functions: the rest is Python, small operations and
    what the clocks cost."""
    if DEVICE == "cuda":
        yield Row("on a GPU the clock would stop before the work does", "", note="python -m kernels")
        return
    runs = [("toy", models.PRESETS["tiny"], torch.float32, 1, 32)]
    if p.checkpoint:
        name = Path(p.checkpoint).name
        cases = ((torch.float32, 1), (torch.float32, 32), (torch.bfloat16, 32))
        runs += [(name, p.checkpoint, dtype, p.threads, batch) for dtype, batch in cases]
    n, start = p.few(4, 64), 32
    for name, home, dtype, n_threads, batch in runs:
        with threads(n_threads):
            engine = Engine({POLICY: (models.load(home, dtype, DEVICE), Silent())}, batch, start + n + 1)
            rows = prompts(home, batch, start)
            kind = models.NAMES[dtype]
            title = f"{name} {kind}, batch {batch}, {n} tokens, prefill included: a step of all rows"
            yield shares(title, partial(generate_ours, engine, rows, n, 0.0), n)
    w = p.few(SMALL, Workload())
    with stretched(models.PRESETS["tiny"], w.context + 1) as longer, threads(1):
        engine = both_roles(two_roles(models.load(longer, torch.float32, DEVICE)), w)
        yield shares(f"toy fp32, episodes, {w.questions} questions x {w.group}", partial(act, engine, w), 1)


def shares(name: str, call: Callable[[], object], steps: int) -> Row:
    """The row of a call: milliseconds a step without clocks, and the share of each part with them."""
    progress("profile", name)
    call()
    plain = min(timed(call) for _ in range(2))
    with clocked() as spent:
        whole = timed(call)
    spent["the rest"] = whole - sum(spent.values())
    note = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in spent.items() if seconds)
    return Row(name, f"{1e3 * plain / steps:,.3g} ms", note=note)


# ------------------------------------------------------------------------------------------- a training step


@dataclass(frozen=True)
class Lesson:
    """Trajectories to be learnt from, and how. Each micro-batch has `micro` rows, ours and theirs."""

    questions: int = 1
    group: int = 4
    prompt: int = 96
    sampled: int = 60  # in each of three turns, give or take a half
    documents: int = 64  # between them
    micro: int = 2
    recompute: bool = True
    kl: float = 1e-3
    steps: int = 1  # that are timed, after one to warm up

    def trajectories(self, vocab: int) -> list[Trajectory]:
        rng, out = random.Random(0), []
        for question in range(self.questions):
            prompt = [rng.randrange(1, vocab) for _ in range(self.prompt)]
            for _ in range(self.group):
                t = Trajectory(Question(str(question), ()))
                t.add(prompt)
                for turn in range(3):
                    n = rng.randint(self.sampled // 2, self.sampled * 3 // 2)
                    t.add([rng.randrange(1, vocab) for _ in range(n)], [-math.log(vocab)] * n)
                    if turn < 2:
                        t.add([rng.randrange(1, vocab) for _ in range(self.documents)])
                out.append(t)
        return out


def rewards(n: int) -> list[float]:
    """Unlike rewards within each group, so that all teach something."""
    return [float(i % 2) for i in range(n)]


def train_ours(home: str, lesson: Lesson, n_threads: int) -> dict:
    """Seconds of each step, peak bytes above the loaded model, trained tokens. Runs in its own process."""
    torch.set_num_threads(n_threads)
    body = models.load(home, device=DEVICE)
    base = forget_peak()
    body.add_role(POLICY, rank=16, alpha=32)
    optimizer = torch.optim.AdamW([body.adapter(POLICY)], lr=1e-5)
    trajectories = lesson.trajectories(body.config.vocab)
    o, spans, health = grpo.Objective(kl=lesson.kl), [], {}
    tokens = lesson.micro * max(len(t.ids) for t in trajectories)

    def step():
        reward = torch.tensor(rewards(len(trajectories))).view(-1, lesson.group)
        adv = grpo.advantages(reward).flatten().tolist()
        batches = grpo.make_batches(trajectories, adv, tokens, DEVICE)
        health.update(grpo.learn(body, batches, optimizer, o, lesson.recompute))

    for _ in range(1 + lesson.steps):
        spans.append(timed(step))
    return {"seconds": spans[1:], "peak": peak() - base, "tokens": health["trained_tokens"]}


def train_theirs(home: str, lesson: Lesson, n_threads: int) -> dict:
    """The same by TRL. Its public `rollout_func` hands it the trajectories instead of sampling (`env_mask`
    says which tokens are the policy's), so a step is all that TRL does but generation: its reference's
    log-probs, micro-batches, loss, backward pass, clipping, AdamW."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "1"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(n_threads)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    body = transformers_body(home, torch.float32)
    base, began, ended = forget_peak(), [], []
    trajectories = lesson.trajectories(body.config.vocab_size)
    rows = len(trajectories)

    def rollout(prompts, trainer) -> dict:
        began.append(time.perf_counter())
        cut = lesson.prompt
        return {
            "prompt_ids": [t.ids[:cut] for t in trajectories],
            "completion_ids": [t.ids[cut:] for t in trajectories],
            "logprobs": [t.logps[cut:] for t in trajectories],
            "env_mask": [t.mask[cut:] for t in trajectories],
        }

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronise()
            ended.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=lesson.micro,
            gradient_accumulation_steps=rows // lesson.micro,
            num_generations=lesson.group,
            max_completion_length=sum(map(len, [t.ids for t in trajectories])),
            gradient_checkpointing=lesson.recompute,
            beta=lesson.kl,
            learning_rate=1e-5,
            max_steps=1 + lesson.steps,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
            bf16=False,
            use_cpu=DEVICE == "cpu",
        )
        trainer = GRPOTrainer(
            body,
            reward_funcs=lambda completions, **_: rewards(len(completions)),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * 8 * rows}),
            processing_class=AutoTokenizer.from_pretrained(home),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
            ),
            rollout_func=rollout,
            callbacks=[Watch()],
        )
        with redirect_stdout(io.StringIO()):
            trainer.train()
    spans = [b - a for a, b in zip(began, ended)]
    return {"seconds": spans[1:], "peak": peak() - base, "tokens": sum(sum(t.mask) for t in trajectories)}


def apart(f: Callable, *arguments) -> dict:
    """f(*arguments) in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(f, arguments)


def training(p: Run) -> Iterator[Row]:
    """A whole update against TRL's GRPOTrainer with PEFT's LoRA of rank 16 on all seven matrices, fp32.
    Neither samples: the copies of the matrices that our engine holds on a CPU are not in the peak."""
    small = Lesson(2, 2, 12, 6, 4, steps=1)
    real = Path(p.checkpoint).name
    for recompute in p.few((True,), (True, False)):
        lesson = replace(p.few(small, Lesson(questions=2, steps=5)), recompute=recompute)
        yield from training_of(p, "toy", models.PRESETS["tiny"], 1, lesson)
    for recompute in p.few((True,), (True, False)) if p.checkpoint else ():
        lesson = replace(p.few(small, Lesson()), recompute=recompute)
        yield from training_of(p, real, p.checkpoint, p.threads, lesson)


def training_of(p: Run, name: str, home: str, n_threads: int, lesson: Lesson) -> Iterator[Row]:
    how = "activations computed again" if lesson.recompute else "activations kept"
    name = f"{name} fp32, {how}"
    if not installed("trl", "peft", "datasets"):
        yield absent(name)
        return
    runs = []
    for _ in range(p.few(1, 2)):
        for f in (train_ours, train_theirs):
            progress("training", name, f.__name__)
            runs.append(apart(f, str(home), lesson, n_threads))
    ours, theirs = runs[::2], runs[1::2]
    tokens = {r["tokens"] for r in runs}
    assert len(tokens) == 1, f"not the same work: {tokens} trained tokens"
    spans = tuple([s for r in side for s in r["seconds"]] for side in (ours, theirs))
    yield versus(f"{name}: a step", spans, note=f"{tokens.pop():,} trained tokens, KL {lesson.kl}")
    a, b = (statistics.median(r["peak"] for r in side) for side in (ours, theirs))
    peaks = [t["peak"] / o["peak"] for o, t in zip(ours, theirs) if o["peak"]]
    if peaks and (p.quick or name.split()[0] != "toy"):  # a toy's activations are less than its libraries
        shown = (f"{a / 2**20:,.0f} MiB", f"{b / 2**20:,.0f} MiB")
        spread = (min(peaks), max(peaks))
        yield Row(f"{name}: peak memory", *shown, statistics.median(peaks), spread, "above the loaded body")


# ---------------------------------------------------------------------------------------------------- growth


def turn_seconds(engine: Engine, rows: int, history: int, feed: int, decode: int, vocab: int) -> float:
    """Seconds of one turn of `rows` siblings with a history: `feed` tokens are new, `decode` sampled."""
    spans = []
    w = Workload(vocab=vocab)

    def one(row: int) -> Episode:
        context = object()
        yield Turn(w.ids(0, n=history), POLICY, 1, 1.0, (), (0, row, 0), context)
        synchronise()
        began = time.perf_counter()
        yield Turn(w.ids(row, n=feed), POLICY, decode, 1.0, (), (0, row, 1), context)
        synchronise()
        spans.append((began, time.perf_counter()))

    engine.run([one(row) for row in range(rows)])
    return max(end for _, end in spans) - min(began for began, _ in spans)


def growth(p: Run) -> Iterator[Row]:
    """What grows, and how fast: an exponent of 0 is flat, of 1 in proportion."""
    with stretched(models.PRESETS["tiny"], 2048) as home, threads(1):
        body = two_roles(models.load(home))
        yield history_row(p, body)
        yield from turns_rows(p, body)
        yield from group_rows(p, body)
        yield from vocabulary_rows(p)


def median_of(p: Run, call: Callable[[], float]) -> float:
    call()
    return statistics.median(call() for _ in range(p.few(1, 5)))


def history_row(p: Run, body: Model) -> Row:
    progress("growth", "history")
    sizes = p.few([16, 32], [128, 256, 512, 1024])
    engine = Engine({POLICY: (body, Silent())}, 8, sizes[-1] + 70)
    n = p.few(4, 32)
    spans = [median_of(p, lambda h=h: turn_seconds(engine, 8, h, n, n, body.config.vocab)) for h in sizes]
    return grows(f"a turn (8 rows, {n} tokens fed, {n} sampled): history", sizes, spans, "seconds")


def turns_rows(p: Run, body: Model) -> Iterator[Row]:
    progress("growth", "turns")
    sizes = p.few([2, 3], [2, 4, 8, 16])
    works = [Workload(2, 4, 64, n, 12, 12, 12, 32, body.config.vocab) for n in sizes]
    engine = Engine({r: (body, Silent()) for r in (POLICY, SIMULATOR)}, 14, works[-1].context + 1)

    def run(w: Workload) -> float:
        return timed(lambda: act(engine, w))

    spans = [median_of(p, lambda w=w: run(w)) for w in works]
    sampled = [w.decoded() for w in works]
    yield grows("episodes (8 rows), exponent in tokens sampled: turns", sizes, spans, "seconds", sampled)
    peaks = [float(metered(lambda w=w: run(w)).peak) for w in works]
    yield grows("their peak beyond the cache: turns", sizes, peaks, "bytes", sampled)


def group_rows(p: Run, body: Model) -> Iterator[Row]:
    progress("growth", "group")
    sizes = p.few([2, 4], [4, 8, 16, 32])
    spans, learnt, peaks = [], [], []
    optimizer = torch.optim.AdamW([body.adapter(POLICY)], lr=1e-5)
    for group in sizes:
        w = Workload(1, group, 64, 2, *p.few((4, 8, 8), (16, 48, 64)), 32, body.config.vocab)
        episodes = partial(act, both_roles(body, w), w)

        def learn(ts: list[Trajectory]) -> dict:
            adv = grpo.advantages(torch.tensor([rewards(len(ts))])).flatten().tolist()
            return grpo.learn(body, grpo.make_batches(ts, adv, 1024), optimizer, grpo.Objective())

        lesson = partial(learn, episodes())
        spans.append(median_of(p, partial(timed, episodes)))
        learnt.append(median_of(p, partial(timed, lesson)))
        peaks.append(float(metered(lesson).peak))
    yield grows("acting: siblings", sizes, spans, "seconds")
    yield grows("learning: siblings", sizes, learnt, "seconds")
    yield grows("its peak (micro-batches of 1,024 tokens): siblings", sizes, peaks, "bytes")


def logp_and_back(h: Tensor, W: Tensor, targets: Tensor, f: Callable) -> None:
    """Log-probs and the gradient of their sum."""
    h = h.detach().requires_grad_()
    f(h, W, targets)[0].sum().backward()


def naive_logp(h: Tensor, W: Tensor, targets: Tensor) -> tuple[Tensor]:
    """What most programs do: all logits, and log_softmax over them."""
    return (torch.log_softmax((h @ W.T).float(), -1).gather(1, targets[:, None])[:, 0],)


def logp_inputs(n: int, d: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(n, d, generator=g), torch.randn(vocab, d, generator=g)
    return h, W, torch.randint(vocab, (n,), generator=g)


def vocabulary_rows(p: Run) -> Iterator[Row]:
    progress("growth", "vocabulary")
    sizes = p.few([1024, 2048], [8192, 32768, 65536, 151936])
    spans, peaks = [], []
    for vocab in sizes:
        x = logp_inputs(p.few(64, 512), 64, vocab)
        spans.append(median_of(p, lambda x=x: timed(lambda: logp_and_back(*x, linear_logp))))
        peaks.append(float(metered(lambda x=x: logp_and_back(*x, linear_logp)).peak))
    yield grows("log-prob and gradient (512 tokens): vocabulary", sizes, spans, "seconds")
    yield grows("its peak: vocabulary", sizes, peaks, "bytes")


# ---------------------------------------------------------------------------------------------------- memory


def memory(p: Run) -> Iterator[Row]:
    """Nothing V wide: the largest tensor of a step, and the log-prob's peak beside the naive one's."""
    vocab, n, d = p.few((2048, 64, 32), (151936, 1024, 128))
    x = logp_inputs(n, d, vocab)
    progress("memory", "log-prob")
    ours, theirs = (metered(lambda f=f: logp_and_back(*x, f)).peak for f in (linear_logp, naive_logp))
    name = f"log-prob and gradient, {n} tokens, V = {vocab:,}"
    shown = (f"{ours / 2**20:,.1f} MiB", f"{theirs / 2**20:,.1f} MiB")
    yield Row(f"{name}: peak", *shown, theirs / ours, note="beside log_softmax over all logits")
    spans = alternate(p, lambda: logp_and_back(*x, linear_logp), lambda: logp_and_back(*x, naive_logp))
    yield versus(f"{name}: time", spans)
    yield largest_tensor(p, vocab)


def largest_tensor(p: Run, vocab: int) -> Row:
    progress("memory", "largest tensor of a step")
    body = Model(replace(toy_shape(), vocab=vocab)).init(0)
    body.add_role(POLICY)
    lesson = p.few(Lesson(2, 2, 12, 6, 4), Lesson())
    ts = lesson.trajectories(vocab)
    adv = [(-1.0) ** i for i in range(len(ts))]
    batches = grpo.make_batches(ts, adv, 1024)
    optimizer = torch.optim.AdamW([body.adapter(POLICY)], lr=1e-5)
    meter = metered(lambda: grpo.learn(body, batches, optimizer, grpo.Objective()))
    logits = max(b.w.numel() for b in batches) * vocab * 4
    shown = (f"{meter.largest / 2**20:.2f} MiB {meter.largest_shape}", f"{logits / 2**20:,.2f} MiB")
    name = f"largest tensor of a step, toy body with V = {vocab:,}"
    return Row(name, *shown, logits / meter.largest, note="beside the logits of its largest micro-batch")


# ----------------------------------------------------------------------------------------------------- a GPU


def gpu(p: Run) -> Iterator[Row]:
    """Random weights in the shape of Qwen2.5-3B, bf16. Without a GPU, a dry run: shapes and bytes on the meta
    device, and the same functions on the CPU with a small body."""
    c, small = plan.shape("3b"), replace(toy_shape(), vocab=512)
    if not torch.cuda.is_available():
        yield from dry_run(replace(c, layers=2) if p.quick else c)
        with threads(1):
            yield from decode_rows(random_body(small, torch.bfloat16, "cpu"), (1, 3), 16, 8)
            yield from pass_rows(random_body(small, torch.bfloat16, "cpu"), 2, 32)
            w = replace(SMALL, vocab=small.vocab)
            s = plan.Settings(6, w.context + 1, 64, True, dtype=torch.bfloat16, kernels=False)
            yield step_row("a step, small body", small, w, s, "cpu")
        return
    few = p.few
    body = random_body(c, torch.bfloat16, "cuda")
    yield from decode_rows(body, few((1, 8), (1, 32, 128, 320)), few(64, 512), few(8, 128))
    yield from pass_rows(body, few(1, 8), few(64, 1024))
    del body
    yield from step_rows(p, c)


def toy_shape() -> Config:
    return Config.from_hf(models.read_json(Path(models.PRESETS["tiny"]) / "config.json", "a checkpoint"))


def random_body(c: Config, dtype: torch.dtype, device: str) -> Model:
    """Random weights with both roles, made on the device itself."""
    with torch.device("meta"):
        body = Model(c)
    body = body.to(dtype).to_empty(device=device)
    body.rotary()
    for x in body.parameters():
        x.data.normal_(0, 0.02) if x.dim() > 1 else x.data.fill_(1.0)
    return two_roles(body)


def decode_bytes(c: Config, seats: int, context: int, dtype: torch.dtype) -> int:
    """The least that one decode step must read: weights (not the embedding's), both adapters, the cache."""
    unread = 0 if c.tied else c.vocab * c.d
    weights = plan.parameters(c) - unread + 2 * sum(plan.blocks(c, 16))
    return weights * dtype.itemsize + seats * context * plan.cache_token(c, dtype)


def decode_rows(body: Model, seats: tuple[int, ...], context: int, tokens: int) -> Iterator[Row]:
    """Tokens a second of the engine, and the bandwidth that they come to."""
    c = body.config
    for n in seats:
        progress("gpu", "decode", n, "seats")
        engine = Engine({POLICY: (body, Silent())}, n, context + tokens + 8)
        turn_seconds(engine, n, context, 1, 4, c.vocab)  # compiles, records graphs
        span = turn_seconds(engine, n, context, 1, tokens, c.vocab)
        rate = decode_bytes(c, n, context + tokens // 2, body.dtype) * tokens / span
        name = f"decode, {n} seats, {context} tokens before: {n * tokens / span:,.0f} tok/s"
        yield share(name, rate, measure.copy_bandwidth(), "GB/s", "copy")
        del engine


def share(name: str, rate: float, ceiling: float, unit: str, of: str) -> Row:
    """The row of a rate beside what this machine can do, which a CPU is not asked for."""
    scale = 1e9 if unit == "GB/s" else 1e12
    theirs = f"{ceiling / scale:,.1f} {unit}" if ceiling else "not measured"
    ratio = rate / ceiling if ceiling else None
    return Row(name, f"{rate / scale:,.3g} {unit}", theirs, ratio, note=f"share of a measured {of}")


def forward_flops(c: Config, rows: int, length: int) -> float:
    """Operations of a forward pass without the head: 2 a weight and token, and causal attention."""
    matrices = c.layers * sum(d_in * sum(parts) for d_in, parts in plan.linears(c))
    attention = c.layers * 4 * c.heads * c.head_dim * (length + 1) / 2  # a token's: q k, and p v
    return rows * length * (2 * matrices + attention)


def pass_rows(body: Model, rows: int, length: int) -> Iterator[Row]:
    """Prefill and training: operations a second. Frozen weights get no gradient: back is as forth."""
    c = body.config
    ids = torch.randint(1, c.vocab, (rows, length), device=body.device)

    def forward() -> None:
        with torch.inference_mode():
            body(ids, POLICY)

    def update(recompute: bool) -> None:
        body(ids, POLICY, recompute=recompute).sum().backward()

    passes = {"prefill": (forward, 1), "forward and backward": (partial(update, False), 2)}
    passes["the same, activations computed again"] = (partial(update, True), 3)
    for name, (call, times) in passes.items():
        progress("gpu", name)
        call()
        span = statistics.median(timed(call) for _ in range(3))
        rate = times * forward_flops(c, rows, length) / span
        title = f"{name}, {rows} x {length} tokens: {rows * length / span:,.0f} tok/s"
        yield share(title, rate, measure.matmul_rate(), "TFLOP/s", "matmul")


def step_rows(p: Run, c: Config) -> Iterator[Row]:
    """The whole step of `--policy 3b --sim 3b` as planned for this card, and as planned for one of 24 GiB."""
    w = p.few(Workload(2, 2, 32, 2, 4, 8, 16, 16), Workload(64, 5, vocab=c.vocab))
    card = torch.cuda.get_device_properties(0).total_memory
    for gib in (card / 2**30, 24.0):
        if gib * 2**30 > card:
            continue
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / card))
        s = plan.Settings(seat_tokens=w.context + 1)
        s, _ = plan.fit([c], gib * 2**30, s, useful=2 * w.rows)
        yield step_row(f"a step of {w.questions} x {w.group} in {gib:.0f} GiB", c, w, s, "cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


def step_row(name: str, c: Config, w: Workload, s: plan.Settings, device: str) -> Row:
    """Act and learn once, from loading on: seconds of each, and the peak beside the planner's."""
    progress("gpu", name, s)
    forget_peak()
    body = random_body(c, s.dtype, device)
    engine = Engine(
        {r: (body, Silent()) for r in (POLICY, SIMULATOR)}, s.seats, s.seat_tokens, s.micro_tokens
    )
    optimizer = torch.optim.AdamW([body.adapter(POLICY)], lr=1e-5)
    trajectories: list[Trajectory] = []

    def play() -> None:
        trajectories[:] = act(engine, w)

    def learn() -> None:
        adv = grpo.advantages(torch.tensor(rewards(w.rows)).view(-1, w.group)).flatten().tolist()
        batches = grpo.make_batches(trajectories, adv, s.micro_tokens, device)
        grpo.learn(body, batches, optimizer, grpo.Objective(), bool(s.recompute))

    acting, learning = timed(play), timed(learn)
    planned, real = plan.budget([c], s)["total"], peak()
    ours = f"act {acting:.3g} s ({w.decoded() / acting:,.0f} tok/s), learn {learning:.3g} s"
    shown = f"peak {real / 2**30:.2f} GiB, planned {planned / 2**30:.2f}" if device == "cuda" else ""
    return Row(f"{name}: {s}", ours, note=shown)


def dry_run(c: Config) -> Iterator[Row]:
    """What needs no arithmetic: every shape of a decode step and of training, and their bytes, on meta."""
    with torch.device("meta"):
        body = Model(c).to(torch.bfloat16)
        body.cos, body.sin = (torch.empty(x.shape, device="meta") for x in (body.cos, body.sin))
        for role in (POLICY, SIMULATOR):
            body.roles[role] = models.Adapter(
                torch.nn.Parameter(torch.empty(plan.adapter(c, 16))), rank=16, alpha=32.0
            )
    for seats in (1, 32, 128, 320):
        progress("gpu", "dry run", seats, "seats")
        cache = Cache(c, seats, 640, body.dtype, "meta")
        start = torch.empty(seats, dtype=torch.long, device="meta")
        window = cache.window(slice(0, seats), 640, start)
        ids = torch.empty(seats, 1, dtype=torch.long, device="meta")
        h = body(ids, start, window=window, lora=body.stacked().rows(start))
        assert h.shape == (seats, 1, c.d) and body.logits(h).shape == (seats, 1, c.vocab)
        planned = plan.cache([c], plan.Settings(seats, 640))
        assert planned == cache.kv.nbytes
        read = decode_bytes(c, seats, 576, body.dtype)
        note = f"meta; the cache of 640 tokens a seat has {planned / 2**30:.2f} GiB"
        yield Row(
            f"dry run, decode, {seats} seats, 512 tokens before", f"{read / 1e9:.2f} GB a step", note=note
        )
    for recompute in (False, True):
        yield dry_training(body, recompute)


def dry_training(body: Model, recompute: bool) -> Row:
    """A micro-batch on meta, where the references run: its peak beside the planner's. Rows are short, because
    there attention keeps its weights, T x T, which it does on no real device."""
    progress("gpu", "dry run", "training")
    ids = torch.empty(64, 32, dtype=torch.long, device="meta")

    def update() -> None:
        h = body(ids, POLICY, recompute=recompute).flatten(0, 1)
        linear_logp(h, body.head, ids.flatten())[0].sum().backward()

    measured = metered(update).peak
    body.adapter(POLICY).grad = None
    s = plan.Settings(seat_tokens=2048, micro_tokens=2048, recompute=recompute, kernels=False)
    planned = sum(plan.learning(body.config, s).values())
    how = "computed again" if recompute else "kept"
    shown = (f"{measured / 2**30:.2f} GiB", f"planned {planned / 2**30:.2f} GiB")
    return Row(f"dry run, training, 2,048 tokens, activations {how}", *shown, planned / measured, note="meta")


# ----------------------------------------------------------------------------------------------------- table

SECTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "sampling": sampling,
    "episodes": episodes,
    "profile": profile,
    "training": training,
    "growth": growth,
    "memory": memory,
    "gpu": gpu,
}


def told(name: str) -> str:
    """What a section says of itself."""
    return " ".join(SECTIONS[name].__doc__.split())


def machine() -> str:
    """The machine, the versions and the date, in one line."""
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        where = f"{os.cpu_count()}-core {found[1] if found else platform.processor()}, no GPU"
    names = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {version(name)}" for name in names if installed(name))
    return f"{where}; Python {platform.python_version()}, {versions}; {time.strftime('%Y-%m-%d')}"


def markdown(rows: list[Row]) -> str:
    """A table as BENCH.md has it."""
    lines = [HEADS, ("---",) * len(HEADS), *(r.cells() for r in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def put(text: str, name: str, body: str) -> str:
    """Replace what stands between a section's marks; a section that is not there comes at the end."""
    begin, end = f"<!-- bench: {name} -->", f"<!-- /bench: {name} -->"
    block = f"{begin}\n{body}\n{end}"
    if begin not in text:
        return text.rstrip("\n") + f"\n\n## {name.capitalize()}\n\n{block}\n"
    head, rest = text.split(begin, 1)
    if end not in rest:
        raise ValueError(f"BENCH.md has {begin} but no {end} after it: put it back")
    return head + block + rest.split(end, 1)[1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    a = models.OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated [all]")
    a.add_argument("--checkpoint", default="", help="a Hugging Face directory, beside the toy body")
    a.add_argument("--threads", type=int, default=os.cpu_count(), help="for the checkpoint; the toy has 1")
    a.add_argument("--seconds", type=float, default=20.0, help="for the repetitions of a row (2 at least)")
    a.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, meaningless figures")
    a.add_argument("--write", action="store_true", help="put the tables into --file")
    a.add_argument("--file", default="BENCH.md", help="what --write writes to [BENCH.md]")
    a.add_argument(
        "--plan", default="", metavar="BODY", help="measure nothing: plan for a preset or directory"
    )
    a.add_argument("--sim", default="", metavar="BODY", help="with --plan: the simulator's body, if another")
    a.add_argument("--memory", type=float, metavar="GIB", help="with --plan: of the card [24]")
    a.add_argument("--seat-tokens", type=int, default=4096, help="with --plan: of a seat [4096]")
    a.add_argument("--rank", type=int, default=16, help="with --plan: of the adapters [16]")
    return a.parse_args(argv)


def run_sections(names: list[str], p: Run) -> Iterator[tuple[str, list[Row]]]:
    """Each section's rows, printed as they come."""
    for name in names:
        print(f"\n{name}: {told(name)}\n", flush=True)
        rows = []
        for row in SECTIONS[name](p):
            rows.append(row)
            print("  ".join(cell for cell in row.cells() if cell), flush=True)
        yield name, rows


def print_plan(a: argparse.Namespace) -> None:
    """The largest settings that fit, and the bytes of each part."""
    bodies = [plan.shape(name) for name in dict.fromkeys((a.plan, a.sim)) if name]
    s = plan.Settings(seat_tokens=a.seat_tokens, rank=a.rank, sim_rank=a.rank)
    memory = 24.0 if a.memory is None else a.memory
    s, b = plan.fit(bodies, memory * 2**30, s)
    print(f"{a.plan}{' with ' + a.sim if a.sim else ''} in {memory:g} GiB: {s}\n{plan.table(b)}")


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and with --write put each section into the file as soon as it is done."""
    a = parse_arguments(argv)
    for flag in ("threads", "seat_tokens", "rank"):
        if getattr(a, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(a, flag)}: must be 1 or more")
    if a.plan:
        return print_plan(a)
    if a.sim or a.memory is not None:
        raise ValueError("--sim and --memory belong to --plan BODY: give that, or leave them out")
    names = [n for n in a.only.split(",") if n]
    if not names:
        raise ValueError(f"--only names no section: there are {', '.join(SECTIONS)}")
    unknown = [n for n in names if n not in SECTIONS]
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    if a.quick and a.write:
        raise ValueError("--quick measures nothing worth keeping: leave out --write")
    if a.checkpoint:
        models.read_json(Path(a.checkpoint) / "config.json", "a checkpoint directory")
    p = Run(a.checkpoint, a.quick, a.threads, a.seconds)
    print(machine(), flush=True)
    for name, rows in run_sections(names, p):
        if a.write:
            file = Path(a.file)
            text = file.read_text(encoding="utf-8") if file.exists() else "# Bench\n"
            body = f"{told(name)}\n{machine()}.\n\n{markdown(rows)}"
            file.write_text(put(text, name, body), encoding="utf-8")


if __name__ == "__main__":
    models.command_line(main)
