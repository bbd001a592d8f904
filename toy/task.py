"""The toy world as a task: its questions, its search engine, its prompts, and the figures that only it has.

`python train.py --data FOLDER` finds the class `Task` in a folder. tasks.py says what each method is for.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import tasks
from rollout import Query, Question, Search, Trajectory

from . import texts, world
from .words import JUDGE, SIM_WORDS, WORDS
from .world import World

FOUND = "\n\n<information>{documents}</information>\n\n"  # as in an episode
RAG = replace(WORDS, prompt=WORDS.prompt + FOUND)


class Task(tasks.Task):
    """Questions about a world whose facts can only be looked up, and the world's own lookup engine."""

    DEFAULTS = {
        **{"turns": 4, "prompt-tokens": 16, "episode-tokens": 192, "turn-tokens": 20},
        **{"observation-tokens": 32, "sim-tokens": 40, "seat-tokens": 256},
        "train": {
            **{"steps": 64, "questions": 16, "group": 8, "eval-questions": 400},
            **{"lr": 2e-3, "micro-tokens": 1024, "sft-steps": 125},
        },
        "eval": {"limit": 300},
        "cold": {"limit": 2000},
        "collect": {"limit": 20_000, "seats": 128, "noise": 0.5},  # without noise there are no noisy rows
    }
    words = dict.fromkeys(("agent", "direct", "cot"), WORDS) | {"rag": RAG}
    sim_words, judge = SIM_WORDS, JUDGE

    def to_train(self) -> tuple[list[Question], list[Question], Search]:
        """Two worlds: the facts of one are false in the other."""
        ours, other = World(2 * self.a.seed), World(2 * self.a.seed + 1)
        self.ours = ours
        return ours.questions(1000), other.questions(self.a.eval_questions), other.lookup

    def practice(self, noise: float) -> Search:
        return partial(self.ours.lookup, noise=noise)

    def to_evaluate(self) -> dict[str, list[Question]]:
        if self.a.data != self.a.task:
            return super().to_evaluate()
        return {self.a.task: World(self.a.world).questions(self.a.limit)}

    def to_collect(self) -> list[Question]:
        return world.fresh_questions(self.a.limit, self.a.seed)

    def search(self, named: str) -> Search:
        if named != self.a.task:
            return super().search(named)
        anywhere = self.a.command in ("collect", "cold")  # each question is about a world of its own
        lookup = world.lookup_anywhere if anywhere else World(self.a.world).lookup
        return partial(lookup, noise=getattr(self.a, "noise", 0.0))

    def shown(self, search: Search) -> Search:
        """Facts in a random order: a simulator writes the best first, the lookup engine does not."""
        return world.shuffled(search)

    def ways(self, search: Search) -> dict[str, tuple[str, Search, float]]:
        noisy = ("sampled, engine noise .3", partial(search, noise=0.3), 1.0)
        return super().ways(search) | {"_noise": noisy}

    def figures(self, trajectories: list[Trajectory]) -> dict[str, float]:
        return {"skips": texts.skipping(trajectories)}  # does the policy exploit the simulator's leaks?

    def rows(self, n: int) -> list[dict]:
        return texts.rows(n, self.a.seed)

    def audit(self, write: Callable[[list[Query], bool], list[str]]) -> dict[str, float]:
        return texts.audit(write, seed=self.a.seed)
