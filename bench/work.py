"""The work that is measured: bodies and prompts, episodes of forced lengths, updates.

Not real text: apart from the prompts, ids are random, and a body does not mind.
"""

import importlib.util
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import grpo
import model as models
import weights
from model import POLICY, SIMULATOR, Config, Model
from rollout import DOCUMENTS, TOKENS, Engine, Episode, Question, Trajectory, Turn
from tokenizer import Tokenizer

README = Path(__file__).parent.parent / "README.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # ours and theirs


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with n threads, ours and theirs alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


class Silent:
    """A tokenizer to which no token ends anything: without stops, every turn runs to its limit."""

    eos: frozenset[int] = frozenset()

    def token_bytes(self, i: int) -> bytes:
        return b""

    def decode(self, ids: list[int]) -> str:
        return ""


@dataclass(frozen=True)
class Body:
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
        """transformers' model, as it comes (sdpa, a growing cache), but no token ends its text."""
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        theirs = AutoModelForCausalLM.from_pretrained(self.home, dtype=self.dtype).to(DEVICE).eval()
        theirs.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        return theirs

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """`count` different prompts (ids) of `length` tokens: stretches of this repository's README."""
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
    """Random weights with both roles, made on the device itself."""
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
    assert out.size(1) == longest + n, "transformers stopped early: the lengths are not forced"
    return out[:, longest:].tolist()


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

    def engine(self, body: Model) -> Engine:
        """As many seats as train.py gives it, for both roles."""
        return engine(body, 2 * self.rows, self.context + 1, (POLICY, SIMULATOR))

    def episode(self, row: int) -> Episode:
        """One episode, of which the engine sees what it sees of `rollout.episode`."""
        t, lengths, fed = Trajectory(Question("", ())), self.lengths(row), 0
        t.add(self.ids(0, row // self.group, n=self.prompt))
        for call, length in enumerate(lengths):
            address = (0, 0, row // self.group, row % self.group, call)
            sampled = yield Turn(t.ids[fed:], POLICY, length, 1.0, (), (*address, TOKENS), t)
            t.add(sampled.ids, sampled.logps)
            fed = len(t.ids)
            if call + 1 < len(lengths):
                order = self.ids(1, n=self.order) + sampled.ids
                t.add((yield Turn(order, SIMULATOR, self.documents, 1.0, (), (*address, DOCUMENTS))).ids)
        return t

    def act(self, engine: Engine) -> list[Trajectory]:
        return engine.run([self.episode(row) for row in range(self.rows)])


SMALL = Workload(2, 2, 20, 2, 2, 6, 8, 10)  # for a smoke run


@dataclass(frozen=True)
class Lesson:
    """Trajectories to learn from, and how. Each micro-batch has `micro` rows, ours and theirs."""

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


SHORT = Lesson(2, 2, 12, 6, 4)  # for a smoke run


def rewards(n: int) -> list[float]:
    """Different rewards within each group, so that all of them teach something."""
    return [float(i % 2) for i in range(n)]


def learner(
    body: Model, ts: list[Trajectory], group: int, tokens: int, kl: float = 1e-3, recompute: bool = False
) -> Callable[[], dict]:
    """An update of the policy's adapter, in micro-batches of `tokens`; it returns its health figures."""
    optimizer = torch.optim.AdamW([body.adapter(POLICY)], lr=1e-5)

    def update() -> dict:
        adv = grpo.advantages(torch.tensor(rewards(len(ts))).view(-1, group)).flatten().tolist()
        batches = grpo.make_batches(ts, adv, tokens, body.device)
        return grpo.learn(body, batches, optimizer, grpo.Objective(kl=kl), recompute)

    return update
