"""Acting at the limit of a card, by counting: the engine's own scheduler, with a body that computes nothing.

Exact on any machine: decode steps, forwards, tokens, bytes and launches. Measured here: the host's time for a
forward, with a narrow body and without Triton's own launcher. On top: the floor of a step, and seconds.

Not a measurement of a GPU: what a card reaches of its floor is for `python -m bench --only gpu` to say.
"""

import importlib
import random
import statistics
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from cache import PAGE, Pages
from cli import plan
from engine import PATIENCE, Engine, Pool, bucket
from kernels.launch import HAVE_TRITON
from model import POLICY, SIMULATOR, Adapter, Config, Model, Stack
from rollout import coin
from words import PROMPTED_WORDS, WORDS

from .gpu import decode_bytes, forward_flops
from .timing import Row, Run, clock, progress
from .work import Silent, Workload, random_body

BF16 = torch.bfloat16
CHARACTERS = 4.6  # of a token of these prompts in Qwen's vocabulary
SEARCHES = (10, 40, 29, 11, 6, 4)  # of 100 episodes, with 0, 1, ..., 5 of them: 1.75 on average


class Card(NamedTuple):
    """What a card can do: copies, in bytes a second, and matmuls, in operations a second."""

    name: str
    copy: float
    matmul: float


CARDS = Card("H100", 3.0e12, 7.9e14), Card("4090", 0.93e12, 1.6e14)
REACHED = 0.75, 0.5  # share of the copies in a decode step, and of the matmuls in a long pass, by assumption


@dataclass(frozen=True)
class Searching(Workload):
    """Episodes with 0 to 5 searches, and prompts of which only the end differs from one to the next."""

    questions: int = 64
    group: int = 5
    shortest: int = 60
    longest: int = 160
    documents: int = 260

    def lengths(self, row: int) -> list[int]:
        rng, place = random.Random(row), (row * 7919 % self.rows + 0.5) / self.rows  # siblings lie apart
        searches = bisect(list(accumulate(SEARCHES)), 100 * place)
        return [rng.randint(self.shortest, self.longest) for _ in range(1 + searches)]

    def decoded(self) -> int:
        return sum(sum(n := self.lengths(row)) + (len(n) - 1) * self.documents for row in range(self.rows))

    def ids(self, *key: int, n: int) -> list[int]:
        """A prompt of the policy is of its question only at its end."""
        own = super().ids(*key, n=n)
        same = min(n, round(WORDS.prompt.index("{") / CHARACTERS)) if key[0] == 0 else 0
        return super().ids(0, n=same) + own[same:]

    def ordered(self, address: tuple[int, ...], query: list[int]) -> list[int]:
        """Constant up to the first place in the template, then of this search; useful and noisy by halves."""
        noisy = coin(address) < 0.5
        text = PROMPTED_WORDS.noisy if noisy else PROMPTED_WORDS.useful
        same, n = (round(x / CHARACTERS) for x in (text.index("{"), len(text)))
        return super().ids(2 + noisy, n=same) + super().ids(*address, n=n - same)


class Nothing:
    """A body that computes nothing: it notes the rows and tokens of each forward, and says anything."""

    device, dtype, roles = torch.device("cpu"), torch.float32, (POLICY, SIMULATOR)
    config = Config("qwen2", vocab=2, d=1, layers=1, heads=1, kv_heads=1, head_dim=2, ffn=1)

    def __init__(self):
        self.cos = torch.empty(32768, 1)
        self.decodes: list[tuple[int, int]] = []  # rows, tokens in their seats
        self.prefills: list[tuple[int, int]] = []  # rows, tokens with their padding
        self.cache: Pages | None = None  # of its pool
        self.used = 0  # pages of it, at most

    def pack(self, rows: int) -> None:
        pass

    def stacked(self, old: Stack | None) -> Stack:
        return Stack([], [1.0, 1.0], torch.ones(2), torch.arange(1, 3))

    def __call__(self, ids, role, window, lora):
        self.used = max(self.used, len(self.cache.owners) - len(self.cache.free))
        if window.lens is None:
            self.decodes.append((len(ids), int(window.start.sum())))
        else:
            self.prefills.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, 1)

    def logits(self, h):
        return torch.zeros(len(h), 2)


def acted(w: Workload, s: plan.Settings) -> tuple[Nothing, Engine]:
    """The workload run by the engine, as it would be on a GPU."""
    body = Nothing()
    tok = Silent()
    bodies = {POLICY: (body, tok), SIMULATOR: (body, tok)}
    e = Engine(bodies, s.seats, s.seat_tokens, s.micro_tokens, s.pages, PAGE)
    e.pools[POLICY].patience, body.cache = PATIENCE, e.pools[POLICY].cache
    w.act(e)
    return body, e


# ----------------------------------------------------------------------------------------------- the launches


class Launches(TorchDispatchMode):
    """Counts launches: Triton's, and torch's operations but for views and empty tensors."""

    FREE = (
        "view _unsafe_view transpose t permute slice select split split_with_sizes unbind unsqueeze squeeze"
    )
    free = {*FREE.split(), *["expand", "detach", "alias", "as_strided", "empty", "new_empty", "empty_like"]}
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f._schema.name.removeprefix("aten::") not in self.free
        return f(*args, **(kwargs or {}))


@contextmanager
def launching(called: Callable) -> Iterator[None]:
    """Inside, the model runs the kernels' wrappers on any tensors; `called` takes the place of a launch."""
    from triton.runtime.jit import KernelInterface

    with ExitStack() as stack:
        stack.enter_context(patch.object(KernelInterface, "__getitem__", lambda kernel, grid: called))
        for name in ("rms_norm", "rope_cache", "cached_attention", "swiglu", "lora", "expand", "sample"):
            file = importlib.import_module(f"kernels.{'lora' if name == 'expand' else name}")
            stack.enter_context(patch.object(kernels, name, getattr(file, f"{name}_triton")))
        yield


def on_meta(c: Config, seats: int) -> Pool:
    """Seats of a body with both adapters, without memory for any of it."""
    with torch.device("meta"):
        body = Model(c).to(BF16)
    body.cos = body.sin = torch.empty(min(c.context, 32768), c.head_dim // 2, device="meta")
    for role in (POLICY, SIMULATOR):
        theta = torch.nn.Parameter(torch.empty(plan.adapter(c, 16), device="meta"))
        body.roles[role] = Adapter(theta, rank=16, alpha=32.0)
    pool = Pool(body, Silent(), seats, 4096, 8192, 1, page=PAGE)
    pool.kind_of(())
    return pool


def narrow(c: Config) -> Pool:
    """Seats of a body of as many layers, so narrow that only the host's part of a forward takes time."""
    body = random_body(replace(c, vocab=256, d=32, head_dim=16, ffn=32), torch.float32, "cpu")
    with patch.object(kernels, "joins", lambda x: True):  # as on a GPU
        return Pool(body, Silent(), 8, 512, 8192, 1, page=PAGE)


def forwards(pool: Pool, T: int) -> dict[str, Callable]:
    """A decode step of all seats, and prefills of 8 of them: rows of both roles, and of one."""

    def prefill(role):
        n = torch.zeros(8, dtype=torch.long, device=pool.cache.kv.device)
        window = replace(pool.cache.window(slice(0, 8), T, n, n), feeds=True)
        pool.model(n[:, None].expand(8, T), role, window=window, lora=pool.stack.rows(role))

    return {
        "a decode step": lambda: pool.decode(len(pool.rows), pool.capacity, pool.role, pool.on),
        "a prefill, both roles": lambda: prefill(pool.role[:8]),
        "a prefill, one role": lambda: prefill(POLICY),
    }


def host(c: Config, times: int) -> dict[str, tuple[int, float]]:
    """Of each of `forwards`: launches, and seconds of the host, the least of some. Empty without Triton."""
    found, shown = {}, forwards(narrow(c), 2)
    for name, call in forwards(on_meta(c, 128), 270).items() if HAVE_TRITON else ():
        progress("counts", name)
        mode, spans = Launches(), []

        def count(*_, mode=mode, **__):
            mode.count += 1

        with launching(count), torch.no_grad(), mode:
            call()
        with launching(lambda *_, **__: None), torch.inference_mode():
            for _ in range(times * ("prefill" in name)):  # a decode step is a CUDA graph: one launch
                began = clock()
                shown[name]()
                spans.append(clock() - began)
        found[name] = mode.count, min(spans, default=0.0)
    return found


# --------------------------------------------------------------------------------------------------- the rows


def counts(p: Run) -> Iterator[Row]:
    """The engine's scheduler on 64 x 5 episodes (turns of 60 to 160 tokens, documents of 260, 1.75 searches
    each) and the shapes of Qwen2.5-3B, without arithmetic, with the seats planned for three cards: counts are
    exact. Host: on this machine, without arithmetic and without Triton's launcher. Floor: the greater of
    bytes / copy and operations / matmul. Seconds assume .75 of the copies, .5 of the matmuls."""
    c = plan.shape("3b")
    c = replace(c, layers=2) if p.quick else c
    w = p.few(Searching(2, 2), Searching())
    found = host(c, p.few(1, 7))
    for name, (launches, spent) in found.items():
        shown = f"{1e3 * spent:.1f} ms" if spent else "a CUDA graph"
        yield Row(f"host, {name}", shown, note=f"{launches:,} launches")
    for name in ("3b", "7b", "14b"):
        bodies = [replace(plan.shape(name), bits=bits) for bits in (0, 8, 4)]
        plain, *fewer = (decode_bytes(body, 16, 2048, BF16) / 1e9 for body in bodies)
        told = ", ".join(f"{bits} bits {gb:.2f} GB" for bits, gb in zip((8, 4), fewer))
        note = f"bf16 {plain:.2f} GB, {told}: the weights, both adapters, the cache"
        yield Row(f"{name}, a decode step of 16 seats with 2,048 tokens each", f"{plain:.2f} GB", note=note)
    slowest = max((spent for _, spent in found.values()), default=0)
    for gib in (24, 48, 80):
        progress("counts", gib, "GiB")
        s, _ = plan.fit([c], gib * 2**30, plan.Settings(), useful=2 * w.rows)
        body, e = acted(w, s)
        yield counted(f"{gib} GiB", body, e)
        yield floors(f"{gib} GiB", c, w, s, body, slowest)


def counted(name: str, body: Nothing, e: Engine) -> Row:
    """The row of what the scheduler did."""
    stats, rows = e.stats, [n for n, _ in body.decodes]
    seats = len(e.pools[POLICY].rows)
    shown = f"{seats} seats, {stats.steps:,} decode steps, {len(body.prefills):,} prefill forwards"
    note = f"{stats.prefilled:,} tokens prefilled, {stats.shared:,} shared; rows a step: "
    note += f"{statistics.mean(rows):.0f}, {max(rows)} at most; {body.used:,} of {len(body.cache.owners):,} "
    return Row(name, shown, note=f"{note}pages used, {stats.preempted} seats preempted")


def floors(name: str, c: Config, w: Workload, s: plan.Settings, body: Nothing, host: float) -> Row:
    """The row of what that costs: bytes of a step, its floor, seconds to act and to learn on each card."""
    sizes = [(decode_bytes(c, 1, held, BF16) + 8 * bucket(n) * c.vocab) for n, held in body.decodes]
    work = [bucket(n) * (forward_flops(c, 1, 1) + 2 * c.vocab * c.d) for n, _ in body.decodes]
    passes = [forward_flops(c, *shape) for shape in body.prefills]
    lengths = [w.lengths(row) for row in range(w.rows)]
    episodes = [w.prompt + sum(n) + (len(n) - 1) * w.documents for n in lengths]
    once = sum(forward_flops(c, 1, n) for n in episodes) + 2 * c.vocab * c.d * sum(map(sum, lengths))
    learning = once * (4 if s.recompute else 3)  # the reference's pass, the policy's, back, and again
    told = []
    for card in CARDS:
        steps = [max(b / card.copy, f / card.matmul) for b, f in zip(sizes, work)]
        fed = sum(max(host, f / card.matmul / REACHED[1]) for f in passes)
        act, learn = sum(steps) / REACHED[0] + fed, learning / card.matmul / REACHED[1]
        floor = 1e3 * statistics.mean(steps)
        told.append(f"{card.name}: floor {floor:.2f} ms a step, act {act:.1f} s, learn {learn:.1f} s")
    return Row(f"{name}, a step", f"{statistics.mean(sizes) / 1e9:.2f} GB", note="; ".join(told))
