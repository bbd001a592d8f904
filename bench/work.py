"""The work that is measured: bodies and prompts, episodes of fixed lengths, updates.

Not real text: except in prompts, ids are random, which does not change the cost.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import grpo
import model as models
import recipes
import weights
from engine import Engine
from model import POLICY, SIMULATOR, Config, Model
from rollout import DOCUMENTS, TOKENS, Episode, Question, Trajectory, Turn
from tokenizer import Tokenizer

README = Path(__file__).parent.parent / "README.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of ours and theirs


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with n threads, ours and theirs alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def installed(*names: str) -> bool:
    return all(map(find_spec, names))


def draw(rng: random.Random, vocab: int, n: int) -> list[int]:
    """n ids from 1..vocab-1."""
    return [rng.randrange(1, vocab) for _ in range(n)]


class Silent:
    """A tokenizer without an end token or text: no stop is ever found, so every turn runs to its limit."""

    eos: frozenset[int] = frozenset()

    def token_bytes(self, i: int) -> bytes:
        return b""

    def decode(self, ids: list[int]) -> str:
        return ""


class Body(NamedTuple):
    """A checkpoint, and the type and the number of threads that it is run with."""

    name: str = "toy"
    home: str = weights.PRESETS["tiny"]
    dtype: torch.dtype = torch.float32
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.name} {models.NAMES[self.dtype]}"

    def ours(self, context: int = 0) -> Model:
        """Our body, with room for `context` positions."""
        body = weights.load(self.home, self.dtype, DEVICE)
        body.config = replace(body.config, context=max(context, body.config.context))
        body.rotary()
        return body

    def theirs(self):
        """transformers' model with its defaults (sdpa, a growing cache), but without an end token."""
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        theirs = AutoModelForCausalLM.from_pretrained(self.home, dtype=self.dtype).to(DEVICE).eval()
        theirs.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        return theirs

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """`count` different prompts (ids) of `length` tokens: passages of this repository's README."""
        ids = Tokenizer.load(self.home).encode(README.read_text(encoding="utf-8"))
        rng = random.Random(0)
        return [ids[i : i + length] for i in (rng.randrange(len(ids) - length) for _ in range(count))]


def with_roles(body: Model, rank: int = 16) -> Model:
    """Give a body adapters of both roles that are not zero."""
    for role in (POLICY, SIMULATOR):
        body.add_role(role, rank=rank)
        body.adapter(role).data.add_(1e-3)
    return body


def random_body(c: Config, dtype: torch.dtype, device: str) -> Model:
    """Random weights with both adapters, made on the device itself."""
    with torch.device("meta"):
        body = Model(c)
    body = body.to(dtype).to_empty(device=device)
    body.rotary()
    for x in body.parameters():
        x.data.normal_(0, 0.02) if x.dim() > 1 else x.data.fill_(1.0)
    return with_roles(body)


def engine(body: Model, seats: int, capacity: int, roles: tuple[int, ...] = (POLICY,), **more) -> Engine:
    """An engine in which every turn runs to its limit."""
    return Engine({role: (body, Silent()) for role in roles}, seats, capacity, **more)


def generate_ours(engine: Engine, rows: list[list[int]], n: int, temperature: float) -> list[list[int]]:
    """n tokens after each prompt."""

    def one(i: int, ids: list[int]) -> Episode:
        return (yield Turn(ids, POLICY, n, temperature, (), (0, i, TOKENS))).ids

    return engine.run([one(i, ids) for i, ids in enumerate(rows)])


@torch.inference_mode()
def generate_theirs(theirs, rows: list[list[int]], n: int, temperature: float) -> list[list[int]]:
    """The same by transformers; prompts of different lengths are padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=DEVICE)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=n, **how)
    assert out.size(1) == longest + n, "transformers stopped early: the lengths are not fixed"
    return out[:, longest:].tolist()


@dataclass(frozen=True)
class Workload:
    """Episodes of fixed lengths, in tokens: a prompt, turns, and a simulator's documents between them."""

    questions: int = 4
    group: int = 8
    prompt: int = 200
    turns: int = 3
    shortest: int = 20
    longest: int = 100
    documents: int = 250
    order: int = 150  # the simulator's prompt, to which the query is added
    vocab: int = 512

    @property
    def rows(self) -> int:
        return self.questions * self.group

    @property
    def context(self) -> int:
        """Tokens of the longest episode, or of the longest simulator's prompt and documents."""
        episode = self.prompt + self.turns * self.longest + (self.turns - 1) * self.documents
        return max(episode, self.order + self.longest + self.documents)

    def ids(self, *key: int, n: int) -> list[int]:
        return draw(random.Random(str(key)), self.vocab, n)

    def lengths(self, row: int) -> list[int]:
        rng = random.Random(row)
        return [rng.randint(self.shortest, self.longest) for _ in range(self.turns)]

    def ordered(self, address: tuple[int, ...], query: list[int]) -> list[int]:
        """The simulator's prompt for a query."""
        return self.ids(1, n=self.order) + query

    def decoded(self) -> int:
        """Tokens sampled in all episodes, the simulator's included."""
        return sum(sum(self.lengths(r)) + (self.turns - 1) * self.documents for r in range(self.rows))

    def engine(self, body: Model) -> Engine:
        """An engine with as many seats as train.py plans, for both roles."""
        return engine(body, 2 * self.rows, self.context + 1, (POLICY, SIMULATOR))

    def episode(self, row: int) -> Episode:
        """One episode. To the engine it looks like `rollout.episode`."""
        t, fed, (question, sibling) = Trajectory(Question("", ())), 0, divmod(row, self.group)
        t.add(self.ids(0, question, n=self.prompt))
        lengths = self.lengths(row)
        for call, length in enumerate(lengths):
            address = (0, 0, question, sibling, call)
            sampled = yield Turn(t.ids[fed:], POLICY, length, 1.0, (), (*address, TOKENS), t)
            t.add(sampled.ids, sampled.logps)
            fed = len(t.ids)
            if call + 1 < len(lengths):
                order = self.ordered(address, sampled.ids)
                t.add((yield Turn(order, SIMULATOR, self.documents, 1.0, (), (*address, DOCUMENTS))).ids)
        return t

    def act(self, engine: Engine) -> list[Trajectory]:
        return engine.run([self.episode(row) for row in range(self.rows)])


class Lesson(NamedTuple):
    """Trajectories to learn from, and how. Each micro-batch has `micro` rows, ours and theirs."""

    questions: int = 1
    group: int = 4
    prompt: int = 96
    sampled: int = 60  # in each of three turns, give or take a half
    documents: int = 64  # between them
    micro: int = 2
    recompute: bool = True
    kl: float = 1e-3
    steps: int = 1  # timed, after one to warm up

    def trajectories(self, vocab: int) -> list[Trajectory]:
        rng, out = random.Random(0), []
        for question in range(self.questions):
            prompt = draw(rng, vocab, self.prompt)
            for _ in range(self.group):
                out.append(Trajectory(Question(str(question), ())))
                out[-1].add(prompt)
                for turn in range(3):
                    out[-1].add(draw(rng, vocab, self.documents if turn else 0))
                    n = rng.randint(self.sampled // 2, self.sampled * 3 // 2)
                    out[-1].add(draw(rng, vocab, n), [-math.log(vocab)] * n)
        return out


SMALL, SHORT = Workload(2, 2, 20, 2, 2, 6, 8, 10), Lesson(2, 2, 12, 6, 4)  # for a smoke run


def rewards(n: int) -> list[float]:
    """Different rewards within each group, so that no group is skipped."""
    return [float(i % 2) for i in range(n)]


def learner(
    body: Model, ts: list[Trajectory], group: int, tokens: int, kl: float = 1e-3, recompute: bool = False,
    lent: Callable = nullcontext,
) -> Callable[[], dict]:  # fmt: skip
    """An update of the policy's adapter, in micro-batches of `tokens`; it returns its health figures."""
    optimizer = torch.optim.AdamW([body.adapter(POLICY)], lr=1e-5)

    def update() -> dict:
        adv = recipes.advantages(torch.tensor(rewards(len(ts))).view(-1, group)).flatten().tolist()
        batches = grpo.make_batches(ts, adv, tokens, body.device)
        return grpo.learn(body, batches, optimizer, recipes.Objective(kl=kl), recompute, lent)

    return update
