"""Evaluate a policy with any search engine or none, compare two evaluations, or watch one episode live.

Every question counts: an episode without an answer scores 0. Answers are greedy unless told otherwise. The
scores are in questions.py, intervals and tables in evaluation/report.py, baselines in evaluation/modes.py.

Not a judge, and nothing is filtered.

    python eval.py --policy 3b --adapter runs/x/policy --data all --limit 500 --search bm25:corpus.jsonl.gz
    python eval.py --policy 3b --data nq,mine.jsonl --mode rag --search http://127.0.0.1:8000 --json rag.json
    python eval.py --compare direct.json rag.json      # is the difference more than luck?
    python eval.py --ask "home Balan?"            # one episode, token by token, in the toy world
    python eval.py --data hotpotqa.jsonl --search bm25:corpus.jsonl.gz  # no policy: the search engine alone

With --json FILE each answered question is kept in FILE.part at once; --resume goes on from there.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cli import flags, ranks, screen
from cli.disk import Rows, pinned, readable, write_json
from cli.setting import Setting, load
from engine import Engine, Stats
from evaluation import report
from evaluation.live import Screen, live
from evaluation.modes import MODES
from questions import cover_em, exact_match, f1, holds_answer
from rollout import Episode, Limits, Question, Search, Trajectory
from search import BM25, open_bm25
from tasks import Task, kind
from tokenizer import Tokenizer
from words import WORDS, Words

# ------------------------------------------------------------------------------------------------- evaluating

LIMITS = Limits()


def answered(t: Trajectory) -> dict:
    """One episode as a row: what was asked, done and answered, and what it is worth.

    `found` is 1.0 where a golden answer stood in a document, None where it is yes or no (`holds_answer`).
    """
    q, golds = t.question, t.question.answers
    held = holds_answer("\n".join(documents.text for _, documents in t.searches), golds)
    return {
        **{"id": q.id, "question": q.text, "golden_answers": list(golds), "hops": q.hops},
        **{"answer": t.answer, "end": t.end, "queries": [query.text for query, _ in t.searches]},
        "f1": f1(t.answer, golds),
        "em": exact_match(t.answer, golds),
        "cover_em": cover_em(t.answer, golds),
        "searches": len(t.searches),
        "found": None if held is None else float(held),
    }


def summarise(trajectories: list[Trajectory]) -> dict:
    """`report.summary` of episodes: means, ends by cause, means by hops."""
    return report.summary([answered(t) for t in trajectories])


def episodes(
    tok: Tokenizer,
    questions: list[Question],
    search: Search,
    limits: Limits = LIMITS,
    words: Words = WORDS,
    temperature: float = 0.0,
    address: tuple[int, int] = (0, 0),
    mode: str = "agent",
) -> list[Episode]:
    """One episode a question, not begun, in one of the ways of modes.py.

    address (seed, step) begins the address of every random number: temperature 0 needs none, but a simulator
    draws its documents.
    """
    play = MODES[mode]
    return [
        play(question, search, tok, limits, words, temperature, (*address, i, 0))
        for i, question in enumerate(questions)
    ]


def evaluate(
    engine: Engine, runs: list[Episode], tell: Callable[[int, int, Stats], None] | None = None
) -> tuple[dict, list[Trajectory]]:
    """Run `episodes` -> (`summarise` of them, the episodes in their order). tell: see `Engine.run`."""
    trajectories = ranks.gathered(engine.run(runs[ranks.part()], tell))
    return summarise(trajectories), trajectories


def retrieval(index: BM25, questions: list[Question], depths: tuple[int, ...] = (1, 3, 5, 10)) -> dict:
    """The search engine alone: {"n", "top 1", "top 3", ..., "ms"}.

    "top k" is the share of questions of which a golden answer stands in the first k passages that the
    question itself finds; "ms" the mean time of a query. Questions whose answer is yes or no, which no
    passage holds, are left out of all of them: where there are no others, shares and time are None.
    """
    found, spent = Counter(), 0.0
    questions = [question for question in questions if holds_answer("", question.answers) is not None]
    for question in questions:
        began = time.perf_counter()
        top = index.top(question.text, max(depths))
        spent += time.perf_counter() - began
        hits = [holds_answer(" ".join(index.passage(i)), question.answers) for i in top]
        found.update({k: any(hits[:k]) for k in depths})
    n, sums = len(questions), {f"top {k}": found[k] for k in depths} | {"ms": 1e3 * spent}
    return {"n": n} | {name: value / n if n else None for name, value in sums.items()}


# ----------------------------------------------------------------------------------------------- command line

# What may differ between a run and its resumption: it changes no answer.
FREE = ("json", "resume", "seats", "device", "compare", "ask")


def setting_of(a: argparse.Namespace, task: Task, questions: list[Question]) -> tuple[Setting, Search]:
    """The setting, and the search that its policy is given; questions: what it will be asked."""
    search = None if a.search == "sim" else task.search(a.search)  # first: a broken corpus shows at once
    s = load(a, task, questions)
    return s, task.shown(s.simulator) if search is None else search


def measure(a: argparse.Namespace, task: Task, sets: dict[str, list[Question]]) -> list[dict]:
    """Every set through one search engine -> a row a question: {"set", "number", ..., "seconds"}."""
    settings = pinned({k: v for k, v in vars(a).items() if k not in FREE})
    log = Rows(a.json and f"{a.json}.part", settings, a.resume, key=lambda row: (row["set"], row["number"]))
    done = {name: answered_before(log, name, questions) for name, questions in sets.items()}
    s, search = setting_of(a, task, [q for questions in sets.values() for q in questions])
    clock = [time.perf_counter()]
    for name, questions in sets.items():
        address = (a.seed, 0)
        runs = episodes(s.tok, questions, search, s.limits, s.words, a.temperature, address, a.mode)
        todo = [i for i in range(len(runs)) if i not in done[name]]
        size = 8 * a.seats * ranks.world() if ranks.world() > 1 else len(runs)  # kept by the first process
        with screen.bar(name, len(questions), "questions", len(done[name])) as bar:
            for start in range(0, len(todo), size):
                mine = todo[start : start + size][ranks.part()]
                show = partial(show_progress, bar, before=len(questions) - len(todo) + start)
                s.engine.run([kept(runs[i], log, name, i, clock) for i in mine], show)
                log.share((name, i) for i in mine)
    return [log.rows[key] for name in sets for key in sorted(k for k in log.rows if k[0] == name)]


def answered_before(log: Rows, name: str, questions: list[Question]) -> set[int]:
    """The numbers of a set's questions that are answered. Raises ValueError if they were others, or if a row
    is not what `kept` writes."""
    done = {number for of, number in log.rows if of == name}
    with readable(log.path):
        for number in done:
            row, q = log.rows[name, number], questions[number] if 0 <= number < len(questions) else None
            if q is None or (row["question"], row["golden_answers"]) != (q.text, list(q.answers)):
                raise ValueError(
                    f"{log.path} was begun with other questions in {name}: resume with the same file"
                )
            report.check(row)
    return done


def kept(run: Episode, log: Rows, name: str, number: int, clock: list[float]) -> Episode:
    """An episode whose row is on disk as soon as it ends. `seconds`: since the row before, so that a set's
    rows add up to the time that it took."""
    t = yield from run
    now = time.perf_counter()
    log.add({"set": name, "number": number, **answered(t), "seconds": (now - clock[0]) / ranks.world()})
    clock[0] = now
    return t


def show_progress(bar, done: int, of: int, stats: Stats, before: int = 0) -> None:
    """With its bar, a `tell` for `evaluate`; before: questions that were done when this run began."""
    screen.move(bar, before + done, f"{stats.decoded / max(stats.seconds, 1e-9):,.0f} tokens/s")


def ask(a: argparse.Namespace, task: Task) -> None:
    """One episode on the screen, and its answer on the last line."""
    question = Question(a.ask, (a.answer,) if a.answer else ())
    s, search = setting_of(a, task, [question])
    (run,) = episodes(s.tok, [question], search, s.limits, s.words, a.temperature, (a.seed, 0), a.mode)
    shown = Screen(s.tok, partial(print, end="", flush=True), screen.coloured())
    try:
        (t,) = s.engine.run([live(run, s.tok, shown.show)])
    finally:
        shown.end()  # Ctrl-C leaves no green terminal
    stats = s.engine.stats
    spent = f"{stats.decoded} tokens sampled in {stats.seconds:.1f} s"
    print(f"\n\n{spent}, searches: {len(t.searches)}, end: {t.end}")
    print("(no answer)" if t.answer is None else screen.harmless(" ".join(t.answer.split())))


def search_alone(a: argparse.Namespace, sets: dict[str, list[Question]]) -> dict:
    """Without a policy: what the search engine finds for the questions themselves, printed."""
    index, began = open_bm25(a.search.removeprefix("bm25:")), time.perf_counter()
    parts = {name: retrieval(index, questions) for name, questions in sets.items()}
    print(screen.table(parts))
    print(
        "top k: share of questions whose golden answer is in the first k passages (yes/no questions excluded)"
    )
    return report.average(parts) | {"sets": parts, "seconds": time.perf_counter() - began}


def main(argv: list[str] | None = None) -> None:
    """Measure, compare or ask; print; write the figures."""
    a = flags.settle("eval", flags.given_to("eval", __doc__, argv))
    if a.compare:
        with readable(" or ".join(a.compare)):
            print(report.comparison(report.compare(*a.compare)))
        return
    task = kind(a.task)(a)
    if a.ask is not None:
        ask(a, task)
        return
    with screen.waiting("reading questions"):
        sets, rows = task.to_evaluate(), []
    if a.policy:
        rows = measure(a, task, sets)
        figures = report.figures(rows)
        print(report.results(figures, report.papers(a.policy, a.mode)))
    else:
        figures = search_alone(a, sets)
    if a.json:  # an answer may hold half a surrogate pair
        write_json(a.json, figures | {"flags": vars(a), "questions": rows}, errors="replace")
        if not ranks.rank():
            Path(f"{a.json}.part").unlink(missing_ok=True)
        print(f"see it with: python look.py {a.json}")


if __name__ == "__main__":
    screen.run(main)
