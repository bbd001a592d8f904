"""A task: its questions, the search engine that answers them, its prompts, and any figures of its own.

`Task` itself is the default: question files and a real search engine. Any other task is a folder next to
this file whose `task.py` defines a subclass, also named `Task`; `--data FOLDER` selects it. toy/ is one, and
the task of a command without arguments: to make your own, copy that folder. Commands call these methods and
never check which task they have.

Not a registry: a task exists if its folder does.
"""

import argparse
import importlib
import random
from collections.abc import Callable
from pathlib import Path

from questions import SETS, load_questions
from rollout import Query, Question, Search, Trajectory
from search import open_search, presented
from words import JUDGE, MODE_WORDS, PROMPTED_WORDS

NAMES = sorted(path.parent.name for path in Path(__file__).resolve().parent.glob("*/task.py"))
FIRST = "toy"  # the task of a command without arguments


class Task:
    """Question files and real search engines. a: the settled flags of the command."""

    DEFAULTS: dict[str, object] = {}  # flag -> default, also {command: {flag: default}}; see cli/flags.py
    words = MODE_WORDS  # the policy's prompts, by mode
    sim_words = PROMPTED_WORDS  # of a simulator without prompts of its own
    judge = JUDGE  # labels collected documents

    def __init__(self, a: argparse.Namespace):
        self.a = a

    def to_train(self) -> tuple[list[Question], list[Question], Search | None]:
        """Training questions, held-out ones (or none), and the real search that answers the held-out ones."""
        a = self.a
        questions = [q for name in a.data.split(",") for q in load_questions(name, train=True)]
        if not a.eval_data or not a.eval_questions:
            return questions, [], None
        held = [q for name in a.eval_data.split(",") for q in load_questions(name)]
        held = random.Random(0).sample(held, min(a.eval_questions, len(held)))
        self.live = self.search(a.eval_search)
        return questions, held, self.live

    def practice(self, noise: float) -> Search:
        """The real engine for training questions (--sim real); noise: of the curriculum, if it can."""
        return self.live

    def to_evaluate(self) -> dict[str, list[Question]]:
        """Name of a set, or of a file without its suffix -> questions. ValueError if a name occurs twice."""
        sets = {}
        for source in SETS if self.a.data == "all" else self.a.data.split(","):
            name = Path(source).name.partition(".")[0]
            if name in sets:
                raise ValueError(f"--data names {name} twice: rename one file")
            sets[name] = load_questions(source, self.a.limit)
        return sets

    def to_collect(self) -> list[Question]:
        """Questions whose searches become rows for the simulator's fine-tuning."""
        return [q for name in self.a.data.split(",") for q in load_questions(name, self.a.limit, train=True)]

    def search(self, named: str) -> Search:
        """The real search engine of that name."""
        return Task.shown(self, open_search(named, self.a.documents))

    def shown(self, search: Search) -> Search:
        """The same search, a simulator or a real engine, with its documents as the policy is to see them."""
        return presented(search, self.a.documents, self.a.document_words)

    def ways(self, search: Search) -> dict[str, tuple[str, Search, float]]:
        """How held-out questions are scored before and after: suffix -> (label, search, temperature)."""
        return {"": ("sampled", search, 1.0), "_greedy": ("greedy", search, 0.0)}

    def figures(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Additional figures of a step's episodes, for its line of the log and for the held-out table."""
        return {}

    def rows(self, n: int) -> list[dict]:
        """Rows for the simulator's fine-tuning within train.py (--sft-steps)."""
        raise ValueError("this task has no rows for --sft-steps: use simulator.py sft, then --sim-adapter")

    def audit(self, write: Callable[[list[Query], bool], list[str]]) -> dict[str, float]:
        """How well a simulator plays the search engine; write(queries, noisy) returns what it writes."""
        return {}


def kind(name: str) -> type[Task]:
    """The class of a task: "" is `Task` itself."""
    return importlib.import_module(f"{name}.task").Task if name else Task


def defaults(name: str, command: str = "train") -> dict[str, object]:
    """flag -> default, of a task for a command."""
    if not name:
        return {}
    usual = kind(name).DEFAULTS
    own = {"policy": body_of(name)} | ({"data": name} if command in ("train", "eval") else {})
    return own | {k: v for k, v in usual.items() if not isinstance(v, dict)} | usual.get(command, {})


def body_of(name: str) -> str:
    """The body that a task's folder ships, as a flag names it."""
    return "tiny" if name == FIRST else f"{name}/body"


def named(command: str, given: dict[str, object]) -> str:
    """The task implied by the flags given: --data, --search, or a body made for it. "" is `Task` itself."""
    for flag in ("data", "search"):
        if given.get(flag) in NAMES:
            return given[flag]
    bodies = {body_of(name): name for name in NAMES}
    own = next((bodies[given[flag]] for flag in ("policy", "sim") if given.get(flag) in bodies), "")
    if "data" in given or command == "collect":
        return ""
    silent = "policy" not in given if command == "train" or "ask" in given else command == "eval"
    return own or (FIRST if silent else "")
