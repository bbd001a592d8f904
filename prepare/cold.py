"""A cold start: fine-tune the policy on traces, so that it samples searches and answers, for RL to select.

A small body never writes a tag: every reward is 0, and there is nothing to select. Only what a trace's policy
sampled is learnt, as in training. (What a trace is: traces.py.)

Traces are scripted here, from questions and a real engine: a share of them searches, the others answer at
once. Or they are recorded: the log of `simulator.py collect` is a file of traces, and --least 1 keeps the
episodes that were right (rejection sampling).

    python -m prepare.cold --policy DIR --data nq.jsonl --search bm25:corpus.jsonl.gz --out runs/cold
    python -m prepare.cold --policy DIR --traces rows.jsonl.episodes --least 1 --out runs/cold
    python train.py --policy DIR --adapter runs/cold ...

Not imitation of a stronger model: a script shows the form of an episode, and RL what pays.
"""

import argparse
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cli import disk, flags, screen
from model import POLICY
from prepare.command import settings_of, split_by_question, tune
from prepare.rows import write_rows
from prepare.traces import example, parse_trace
from questions import holds_answer
from rollout import Question, Search
from search import ask, content, read_lines
from tasks import Task, kind

# ------------------------------------------------------------------------------------------------- the traces


def keywords(question: str) -> str:
    """The words of a question that are worth searching for, in its order and spelling."""
    kept = [word for word in question.rstrip(" ?").split() if content(word)]
    return " ".join(kept) or question


def script(questions: list[Question], search: Search, n: int, share: float, seed: int) -> Iterator[dict]:
    """n traces about different questions in a seeded order; a `share` of them searches, the others answer at
    once.

    All are about questions whose answer the engine finds with `keywords`, and chance alone decides which of
    them search: a policy that could tell from the question would have nothing left to explore. Raises
    ValueError if there are too few such questions.
    """
    few = f"{len(questions)} questions: fewer than --scripts {n}"
    if n > len(questions):
        raise ValueError(f"there are {few}")
    rng = random.Random(seed)
    searching = rng.sample([True] * round(n * share) + [False] * (n - round(n * share)), n)
    for q in rng.sample(questions, len(questions)):
        if not searching:
            return
        query = keywords(q.text)
        documents = ask(search, query, q)
        answer = next((gold for gold in q.answers if holds_answer(documents, [gold])), None)
        if answer is None:
            continue
        spans = [["sampled", f"<search> {query} </search>"], ["documents", documents]] * searching.pop()
        spans.append(["sampled", f"<answer> {answer} </answer>"])
        yield {"question": q.text, "golden_answers": list(q.answers), "f1": 1.0, "spans": spans}
    if searching:
        raise ValueError(f"the engine finds the answers of {n - len(searching)} of {few}")


# ----------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    """Make or read the traces, fine-tune the policy's adapter on them, save it with its prompts."""
    a = flags.settle("cold", flags.given_to("cold", __doc__, argv))
    out, task = Path(a.out), kind(a.task)(a)
    with disk.claimed(out, a.resume):
        traces = [row for row in read_lines(a.traces or scripted(a, task, out), parse_trace) if row]
        kept = [row for row in traces if row.get("f1", 1.0) >= a.least]
        if not kept:
            raise ValueError(f"none of the {len(traces)} traces has an f1 of at least --least {a.least}")
        exam, rows = split_by_question(kept, a.held, a.seed)
        tune(a, task, POLICY, rows, exam, lambda s: partial(example, s.tok, s.words, s.limits))


def scripted(a: argparse.Namespace, task: Task, out: Path) -> Path:
    """The file of scripted traces in the run's directory, made if it is not there yet."""
    path, wanted = out / "traces.jsonl", disk.pinned(settings_of(a))
    if path.exists():
        with disk.readable(path):  # earlier versions kept no flags
            disk.same_flags(next(read_lines(path, dict), {}).get("flags", wanted), wanted, out)
    else:
        made = script(task.to_collect(), task.search(a.search), a.scripts, a.searching, a.seed)
        write_rows([{"flags": wanted}, *screen.bar("scripting traces", a.scripts, "traces", over=made)], path)
    return path


if __name__ == "__main__":
    screen.run(main)
