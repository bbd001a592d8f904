"""Collect rows for the simulator's fine-tuning from a real search engine, and label them useful or noisy.

A policy answers questions with a real search engine; each of its searches is a row: query, question, answer,
documents. Three labels say whether the documents are useful:

    judge        the body without an adapter, asked whether they suffice to answer the query (the paper, v3)
    answer       a golden answer appears in them
    trajectory   the episode that read them reached the answer (the paper, v1)

One of them becomes the row's quality, and the set is balanced. Every episode is one line of a log, written
when it ends: an interrupted run resumes, and another label or more rows cost no second run.

Not the fine-tuning (sft.py), not a search engine (search.py), and not a filter: what is not used is counted.

    python simulator.py collect --policy 3b --data nq,hotpotqa --search bm25:corpus.jsonl.gz --rows 10000 \\
        --judge judge --out rows.jsonl
"""

import re
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import combinations

from cli import ranks
from cli.disk import Rows
from cli.flags import LABELS
from cli.screen import bar, move, table
from engine import Engine
from model import REFERENCE
from prepare.rows import row_of
from prepare.traces import spans_of
from questions import cover_em, f1, holds_answer
from rollout import Documents, Limits, Query, Question, Search, Turn, episode
from words import JUDGE, JudgeWords, Words, fill

JUDGED = 4  # the judge's stream of randomness
VERDICT = 8  # tokens, within which yes or no must come


def verdict(text: str, words: JudgeWords) -> bool | None:
    """What the judge said first, yes or no; None where it said neither."""
    yes, no = re.search(words.yes, text), re.search(words.no, text)
    if yes is None or no is None:
        return None if yes is no else yes is not None
    return yes.start() < no.start()


def judged(tok, words: JudgeWords, query: Query, documents: str, room: int) -> Generator:
    """A generator that asks the judge about one search and returns its verdict.

    Documents are cut to fit `room` tokens; None where the query leaves no room for them.
    """

    def asked(text: str) -> list[int]:
        message = fill(words.prompt, query=query.text, question=query.question.text, documents=text)
        return tok.chat([{"role": "user", "content": message}])

    ids = tok.encode(documents)
    spare = room - VERDICT - len(asked("")) - 2
    prompt = asked(documents if len(ids) <= spare else tok.decode(ids[: max(0, spare)]))
    if spare < 1 or len(prompt) + VERDICT >= room:
        return None
    sampled = yield Turn(prompt, REFERENCE, VERDICT, 0.0, (), (*query.address, JUDGED))
    return verdict(tok.decode(sampled.ids), words)


# ------------------------------------------------------------------------------------------------ collecting


@dataclass(frozen=True)
class Collector:
    """How episodes become rows. `search` is the real one; `shown` changes what the policy reads of it.

    force: an episode without a search is given one, for its question. (A small checkpoint never searches.)
    room: tokens that a seat of the engine holds, for the judge's prompts.
    """

    tok: object
    search: Search
    limits: Limits
    words: Words
    judge: JudgeWords = JUDGE
    temperature: float = 1.0
    force: bool = False
    room: int = 4096
    shown: Callable[[Search], Search] | None = None

    def episode(self, question: Question, address: tuple[int, ...]) -> Generator:
        """One episode, then its judge -> {"forced", "rows": [row with "labels"]} and a trace, for the log."""
        found: list[tuple[Query, Documents]] = []

        def noted(query: Query):
            documents = yield from self.search(query)
            found.append((query, documents))
            return documents

        reading = self.shown(noted) if self.shown else noted
        told = (self.tok, self.limits, self.words, self.temperature)
        t = yield from episode(question, reading, *told, address)
        forced = self.force and not found
        if forced:
            yield from noted(Query(question.text, question, (*address, 0)))
        reached = None if forced else bool(cover_em(t.answer, question.answers))
        rows = []
        for query, documents in found:
            says = yield from judged(self.tok, self.judge, query, documents.text, self.room)
            labels = dict(zip(LABELS, (says, holds_answer(documents.text, question.answers), reached)))
            rows.append(row_of(query, documents.text) | {"labels": labels})
        trace = {"question": question.text, "golden_answers": list(question.answers)}
        trace |= {"f1": f1(t.answer, question.answers), "spans": spans_of(t, self.tok)}  # see traces.py
        return trace | {"forced": forced, "rows": rows}


def collect(
    engine: Engine,
    collector: Collector,
    questions: list[Question],
    log: Rows,
    label: str,
    n: int,
    samples: int = 1,
    seed: int = 0,
    rounds: int = 64,
) -> "Sorted":
    """Run episodes until there are n // 2 rows of each quality or every question was asked `samples` times.

    An episode's number gives its address, so results do not depend on which run together; logged ones are
    skipped. rounds: episodes between two looks at the rows.
    """
    left = [i for i in range(samples * len(questions)) if i not in log.rows]
    count = sort_rows(log.rows, label)
    with bar("collecting", 2 * (n // 2), "rows", count.balanced(n)) as shown:

        def noted(i: int):
            number = i % len(questions)
            done = yield from collector.episode(questions[number], (seed, 0, number, i // len(questions)))
            log.add({"episode": i} | done)
            move(shown, shown.n, f"{len(log.rows):,} episodes")

        while left and count.balanced(n) < 2 * (n // 2):
            mine = left[:rounds][ranks.part()]
            engine.run([noted(i) for i in mine])
            log.share(mine)
            left, count = left[rounds:], sort_rows(log.rows, label)
            move(shown, count.balanced(n))
    return count


@dataclass(frozen=True)
class Sorted:
    """The rows of a log by quality, in the order of their episodes, and how many were left out and why."""

    useful: list[dict]
    noisy: list[dict]
    aside: Counter  # undecided | empty | repeated

    def balanced(self, n: int) -> int:
        """Rows of a balanced set of at most n."""
        return 2 * min(len(self.useful), len(self.noisy), n // 2)

    def rows(self, n: int) -> list[dict]:
        """A balanced set of at most n rows: the first of each quality, alternating."""
        return [row for pair in zip(self.useful, self.noisy) for row in pair][: self.balanced(n)]


def all_rows(episodes: dict[int, dict]) -> list[dict]:
    """The rows of a log in the order of the episodes' numbers, not of their ends."""
    return [row for i in sorted(episodes) for row in episodes[i]["rows"]]


def sort_rows(episodes: dict[int, dict], label: str) -> Sorted:
    """Rows by the quality that `label` gives them. Each (question, query, documents) counts once."""
    out, seen = Sorted([], [], Counter()), set()
    for raw in all_rows(episodes):
        row, useful = {k: v for k, v in raw.items() if k != "labels"}, raw["labels"][label]
        key = row["question"], row["query"], row["documents"]
        why = "empty" if not row["documents"] else "repeated" if key in seen else None
        why = why or ("undecided" if useful is None else None)
        seen.add(key)
        if why:
            out.aside[why] += 1
        else:
            (out.useful if useful else out.noisy).append(row | {"quality": "useful" if useful else "noisy"})
    return out


def agreement(rows: list[dict]) -> str:
    """A table of the three labels: what each says, and how often any two say the same where both decide."""
    said = {label: [row["labels"][label] for row in rows] for label in LABELS}
    names = {"useful": True, "noisy": False, "undecided": None}
    lines = [table({k: {name: v.count(x) for name, x in names.items()} for k, v in said.items()})]
    for a, b in combinations(LABELS, 2):
        both = [x == y for x, y in zip(said[a], said[b]) if None not in (x, y)]
        share = f"{sum(both) / len(both):.3f}" if both else "-"
        lines.append(f"{a} and {b} agree on {share} of {len(both)} rows")
    return "\n".join(lines)
