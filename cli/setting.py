"""From flags to what a command works with: bodies, tokenizers, adapters, prompts, limits, simulator, engine.

`load` is the only way to it. Cheap checks come first (files, the memory plan), so that a mistake shows before
a checkpoint is read. Roles with the same checkpoint share one body.

Not a place for defaults: flags.py has settled them.
"""

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import model
import weights
from cli import plan, ranks, screen
from cli.disk import read_json
from cli.flags import OWN, REAL
from engine import Engine
from model import CRITIC, POLICY, REFERENCE, SIMULATOR, START, Model
from rollout import Limits, Question, prompt
from servers import Chat, is_address
from simulator import Simulator
from tasks import Task
from tokenizer import Tokenizer
from words import (
    POLICY_WORDS_FILE,
    PROMPTED_WORDS,
    SFT_WORDS,
    WORDS_FILE,
    SimWords,
    Words,
    load_policy_words,
    save_words,
    words_for,
)

SMALL = 256  # hidden size below which a second thread costs more than it gains


@dataclass
class Setting:
    """Made once from the flags. `simulator` and `engine` are None where the command needs none."""

    task: Task
    bodies: dict[int, tuple[Model, Tokenizer]]  # role -> its body and tokenizer
    words: Words
    limits: Limits
    simulator: Simulator | None
    engine: Engine | None

    @property
    def body(self) -> Model:
        """The policy's body."""
        return self.bodies[POLICY][0]

    @property
    def tok(self) -> Tokenizer:
        return self.bodies[POLICY][1]

    def keep(self, role: int, home: Path) -> None:
        """Write a role's adapter, in PEFT's format, and the prompts that it is trained on."""
        if ranks.rank():
            return
        base = self.task.a.policy if role == POLICY else self.task.a.sim
        weights.save_adapter(self.bodies[role][0], role, home, base)
        words = (self.words, POLICY_WORDS_FILE) if role == POLICY else (self.simulator.words, WORDS_FILE)
        save_words(words[0], home / words[1])


def load(
    a: argparse.Namespace,
    task: Task,
    questions: Iterable[Question] = (),
    homes: dict[int, Path] | None = None,
) -> Setting:
    """Load all that the settled flags name. questions: their prompts must fit, which is checked early. homes:
    what `find_bodies` has found.

    Raises ValueError for anything missing, broken, or too large.
    """
    words = policy_words(a, task) if getattr(a, "policy", "") else None
    sim_words = None
    if simulated(a):
        sim_words = words_for(getattr(a, "sim_adapter", ""), a.sim_prompt, usual_words(a, task))
    homes = find_bodies(a) if homes is None else homes
    limits = limits_of(a) if POLICY in homes else None
    server = Chat(a.sim) if simulated(a) and is_address(a.sim) else None
    with screen.waiting("reading tokenizers, checking prompts"):
        toks = {home: Tokenizer.load(home) for home in dict.fromkeys(homes.values())}
        if questions:
            check_prompts(questions, toks[homes[POLICY]], words, limits.prompt)
    wanted = {role: (home, bits_of(a, role)) for role, home in homes.items()}
    kinds = list(dict.fromkeys(wanted.values()))  # the policy's first, as plans want it
    if a.command == "train":
        print(plan_memory(a, kinds), flush=True)
    dtype = model.DTYPES[a.dtype]
    with screen.waiting("reading weights"):
        loaded = {w: (weights.load(w[0], dtype, a.device, w[1]), toks[w[0]]) for w in kinds}
    bodies = {role: loaded[w] for role, w in wanted.items()}
    if bodies and max(body.config.d for body, _ in bodies.values()) < SMALL:
        torch.set_num_threads(1)
    give_adapters(a, bodies)
    if getattr(a, "seats", 0) is None:
        a.seats, a.pages = seats_for(a, [body.config for body, _ in loaded.values()])
    simulator = None
    if simulated(a):
        tok = bodies.get(SIMULATOR, (None, None))[1]
        temperature = 0.8 if POLICY in homes else a.temperature  # --temperature is then the policy's
        shared = getattr(a, "shared_coins", False)
        noise = getattr(a, "noise", 0.0)
        heed = getattr(a, "heed", 0.0)
        simulator = Simulator(tok, sim_words, noise, shared, a.sim_tokens, temperature, server, heed)
    with screen.waiting("making room for the cache"):
        return Setting(task, bodies, words, limits, simulator, open_engine(a, bodies))


def simulated(a: argparse.Namespace) -> bool:
    """Whether the command has a simulator."""
    if a.command == "train":
        return a.sim not in (OWN, REAL)
    return hasattr(a, "sim") and (a.command != "eval" or a.search == "sim")


def find_bodies(a: argparse.Namespace) -> dict[int, Path]:
    """role -> the directory of its body, for the roles that run in this process."""
    names = {POLICY: a.policy} if getattr(a, "policy", "") else {}
    if a.command == "collect":
        names[REFERENCE] = a.policy  # the judge of documents
    if simulated(a) and not is_address(a.sim):
        names[SIMULATOR] = a.sim or a.policy
    return {role: weights.resolve(name) for role, name in names.items()}


def bits_of(a: argparse.Namespace, role: int) -> int:
    """The bits of a role's frozen matrices; 0: those of --dtype."""
    own = getattr(a, "sim_bits", "") if role == SIMULATOR else ""
    return int(own or a.bits or 0)


def policy_words(a: argparse.Namespace, task: Task) -> Words:
    """The policy's prompts: those of --policy-prompt, else (of an agent) those that its adapter was trained
    with, else the task's for the mode."""
    mode, adapter = getattr(a, "mode", "agent"), getattr(a, "adapter", "")
    saved = Path(adapter, POLICY_WORDS_FILE)
    named = a.policy_prompt or (saved if adapter and mode == "agent" and saved.exists() else "")
    words = load_policy_words(named) if named else task.words[mode]
    if mode == "rag" and "{documents}" not in words.prompt:
        raise ValueError(f"{a.policy_prompt}: for --mode rag, prompt must say where the {{documents}} go")
    return words


def usual_words(a: argparse.Namespace, task: Task) -> SimWords:
    """The simulator's prompts if neither a flag nor an adapter brings any."""
    return SFT_WORDS if a.command == "sft" and task.sim_words is PROMPTED_WORDS else task.sim_words


def limits_of(a: argparse.Namespace) -> Limits:
    return Limits(a.prompt_tokens, a.episode_tokens, a.turn_tokens, a.observation_tokens, a.turns)


def give_adapters(a: argparse.Namespace, bodies: dict[int, tuple[Model, Tokenizer]]) -> None:
    """Read the adapters that are named; make new ones for the other roles that will be trained."""
    trained = {
        POLICY: a.command in ("train", "cold"),
        SIMULATOR: a.command == "sft" or getattr(a, "sft_steps", 0),
    }
    for role, flag in ((POLICY, "adapter"), (SIMULATOR, "sim_adapter")):
        if role in bodies and getattr(a, flag, ""):
            weights.load_adapter(bodies[role][0], role, getattr(a, flag))
        elif role in bodies and trained[role]:
            bodies[role][0].add_role(role, a.rank, a.alpha, a.seed)
    if getattr(a, "advantage", "") == "gae":
        bodies[POLICY][0].add_role(CRITIC, a.rank, a.alpha, a.seed)
    if refers_to_start(a):
        weights.load_adapter(bodies[POLICY][0], START, a.adapter)


def refers_to_start(a: argparse.Namespace) -> bool:
    """Whether the KL's reference is the adapter that the policy starts from (else the body without one)."""
    return a.command == "train" and bool(a.adapter and a.kl and a.kl_in != "none")


def open_engine(a: argparse.Namespace, bodies: dict[int, tuple[Model, Tokenizer]]) -> Engine | None:
    """The engine, with seats that hold a whole episode; None without a policy."""
    if POLICY not in bodies or a.command == "cold":
        return None
    if a.command == "train":
        return Engine(bodies, a.seats, a.seat_tokens, a.micro_tokens, a.pages)
    return Engine(bodies, a.seats, a.episode_tokens + 1, pages=a.pages)


def check_prompts(questions: Iterable[Question], tok: Tokenizer, words: Words, limit: int) -> None:
    """Raise ValueError for a question whose prompt is too long: at the start, not when it is asked."""
    frame = len(prompt(Question("", ()), tok, words, documents=""))
    for q in questions:
        if (
            frame + len(q.text.encode()) + 1 > limit
            and (n := len(prompt(q, tok, words, documents=""))) > limit
        ):
            raise ValueError(
                f"the prompt of question {q.text[:60]!r} has {n} tokens, over {limit}: raise --prompt-tokens"
            )


# ------------------------------------------------------------------------------------------------- the memory


def plan_memory(a: argparse.Namespace, homes: list[tuple[Path, int]]) -> str:
    """Settle the flags that depend on memory -> the budget as text. Raises ValueError if nothing fits.

    A resumed run keeps the plan of its start, whatever memory is free today, unless flags change it.
    """
    shapes = [replace(plan.shape(str(home)), bits=bits) for home, bits in homes]
    memory = a.memory * 2**30 or free_memory(a.device)
    rank, sim_rank = (rank_of(a, adapter) for adapter in (a.adapter, a.sim_adapter))
    settings = plan.Settings(
        a.seats, a.seat_tokens, a.micro_tokens, a.recompute or None, rank,
        sim_rank if a.sim_adapter or a.sft_steps else 0, model.DTYPES[a.dtype], a.device != "cpu",
        a.rank if a.advantage == "gae" else 0, rank if refers_to_start(a) else 0, a.pages, a.lend,
    )  # fmt: skip
    if a.planned:
        return f"as planned at the start: {settings}"
    waiting = simulated(a) and not is_address(a.sim)  # all may wait for documents at once
    useful = -(-a.questions // ranks.world()) * a.group * (1 + waiting)
    settings, budget = plan.fit(shapes, memory, settings, useful)
    a.seats, a.micro_tokens, a.recompute = settings.seats, settings.micro_tokens, bool(settings.recompute)
    a.pages, a.lend, a.planned = settings.pages, settings.lend, True
    return f"plan for {memory / 2**30:.1f} GiB: {settings}\n{plan.table(budget)}"


def seats_for(a: argparse.Namespace, shapes: list[model.Config]) -> tuple[int, int]:
    """Seats and pages of the cache of a command that does not learn, for bodies that are loaded."""
    if a.device == "cpu" or not shapes:
        return 16, 0
    longest = getattr(a, "episode_tokens", 2047) + 1  # an audit's seats are as long as its prompts: shorter
    s = plan.Settings(plan.ENOUGH, longest, 8192, dtype=model.DTYPES[a.dtype])
    return s.seats, plan.acting_pages(shapes, free_memory(a.device), s)


def rank_of(a: argparse.Namespace, adapter: str) -> int:
    """The rank of an adapter on disk, or (adapter "") of the one that will be made."""
    file = Path(adapter) / "adapter_config.json"
    return read_json(file, "a PEFT adapter directory", r=int)["r"] if adapter else a.rank


def free_memory(device: str) -> float:
    """Bytes to plan for: the free memory of a GPU; half of it on a CPU, which other programs share (and its
    part of that for each of several processes)."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.cuda.mem_get_info()[0] if device != "cpu" else 0.5 * model.memory(free=True) / here
