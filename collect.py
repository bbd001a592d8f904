"""Rows for the simulator's fine-tuning: collected from a real engine and labelled, or read from a file.

A policy answers questions with a real engine; each of its searches is a row: query, question, answer,
documents. Three labels say whether the documents are useful:

    judge        the body without an adapter, asked whether they suffice to answer the query (the paper, v3)
    answer       a golden answer stands in them
    trajectory   the episode that read them reached the answer (the paper, v1)

One of them becomes the row's quality; of both qualities equally many rows are kept. Every episode is one line
of a log, written when it ends: nothing is lost or done twice, whatever interrupts a run, and another label
or more rows cost no second run.

What this is not: the fine-tuning (simulator.py), an engine (search.py), or a filter by taste: what is not
used is counted.

    python simulator.py collect --policy 3b --data nq,hotpotqa --search bm25:corpus.jsonl.gz --rows 10000 \\
        --judge judge --out rows.jsonl
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from model import REFERENCE
from questions import cover_em, hub_rows, is_parquet, is_path, normalise, numbered, parquet_rows
from rollout import Documents, Engine, Limits, Query, Question, Search, Turn, Words, episode, fill
from search import read_lines

# ------------------------------------------------------------------------------------------------------- rows

COLUMNS = ("query", "question", "answer", "documents", "quality")
SAID = {"user": "prompt", "human": "prompt", "assistant": "documents", "gpt": "documents"}
# The prompts of the authors' code. Their released tuning sets hold such prompts with documents.
ASKED = re.compile(
    r'answer the question: "(?P<question>.*)" whose answer is (?P<answer>.*?)\.?[ \t]*\n'
    r".*^Query: (?P<query>.*?)\n(?P<quality>Useful|Noisy) Output:\s*\Z",
    re.DOTALL | re.MULTILINE,
)


def _two_texts(pair: object) -> bool:
    return isinstance(pair, list) and [type(text) for text in pair] == [str, str]


def check_row(row: dict) -> dict:
    """The row itself. Raises ValueError with what is wrong with it."""
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            raise ValueError(f"no text in the column {column}")
    if row["quality"] not in ("useful", "noisy"):
        raise ValueError(f"quality is {row['quality']!r}: it must be useful or noisy")
    if unknown := sorted(row.keys() - {*COLUMNS, "earlier"}):
        raise ValueError(f"unknown columns: {', '.join(unknown)}")
    if not (isinstance(row.get("earlier", []), list) and all(map(_two_texts, row.get("earlier", [])))):
        raise ValueError("earlier must be a list of [query, documents]")
    return row


def exchange(row: dict) -> tuple[str, str] | None:
    """(prompt, documents) of a row that holds a whole exchange with a simulator; None where it does not.

    Known columns: instruction (and input) with output, as in the Alpaca form; prompt with response,
    completion or documents; messages or conversations, lists of {role, content} or {from, value}.
    """
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list):
        said = {SAID.get(t.get("role", t.get("from"))): t.get("content", t.get("value")) for t in turns}
        return (said["prompt"], said["documents"]) if {"prompt", "documents"} <= said.keys() else None
    if "instruction" in row and "output" in row:
        return "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    answer = next((k for k in ("response", "completion", "documents") if k in row), None)
    return (row["prompt"], row[answer]) if "prompt" in row and answer else None


def released(prompt: str, documents: str) -> dict:
    """A row from an exchange in the authors' words: query, question, answer and quality are in the prompt.

    Raises ValueError where the prompt has not that layout.
    """
    found = ASKED.search(prompt)
    if found is None:
        end = " ".join(prompt[-80:].split())
        raise ValueError(
            f"its prompt does not end in 'Query: ...' and 'Useful Output:' or 'Noisy Output:': {end!r}"
        )
    listed = re.match(r"\[\s*(['\"])(.*?)\1", found["answer"], re.DOTALL)  # a list of answers, written out
    answer = listed[2] if listed else found["answer"]
    row = {"query": found["query"].strip(), "question": found["question"], "answer": answer}
    return row | {"documents": documents.strip(), "quality": found["quality"].lower()}


def parse_row(row: dict, columns: dict[str, str] | None = None) -> dict:
    """A row of this project's columns, or of an exchange; `columns`: our name -> the file's.

    Raises ValueError for anything else, with the names of its columns and of those that were expected.
    """
    ours = {theirs: name for name, theirs in (columns or {}).items()}
    row = {ours.get(name, name): value for name, value in row.items()}
    if pair := exchange(row):
        if not all(isinstance(text, str) for text in pair):
            raise ValueError("the prompt and the documents must be texts")
        return check_row(released(*pair))
    if not row.keys() & {"query", "documents", "quality"}:
        hint = ": these are questions, for collect --data" if "golden_answers" in row else ""
        raise ValueError(
            f"has the columns {', '.join(row)}{hint}; expected are {', '.join(COLUMNS)}, or a prompt and its "
            "documents (instruction, output; prompt, response; messages; conversations). "
            "--columns prompt=NAME,documents=NAME says what is what"
        )
    return check_row(row)


def read_rows(source: str | Path, columns: dict[str, str] | None = None) -> list[dict]:
    """Rows {"query", "question", "answer", "documents", "quality": "useful" | "noisy"} of a file or hub set.

    A row may also hold "earlier": [[query, documents], ...], the searches before it. The file is JSON lines
    (plain or gzip), a JSON list, or parquet; what is no file, nor a path, but OWNER/NAME comes from the hub.
    The authors' released sets (SimulationTuning_wiki_dataset and SimulationTuning_google_dataset of
    Alibaba-NLP) are a JSON file each. Their columns are documented nowhere that we found: they are mapped by
    `exchange` and `released`, and where they are called otherwise `columns` names them. (ZeroSearch_dataset
    holds questions, no documents.) Raises ValueError that names file and line, or row, for what is broken;
    FileNotFoundError where there is no such file.
    """
    name, path, parse = str(source), Path(source), partial(parse_row, columns=columns)
    if path.exists():
        table = parquet_rows(path) if is_parquet(path) else _listed(path)
    elif is_path(name) or name.count("/") != 1:
        raise FileNotFoundError(f"there is no file {name}")
    else:
        table = hub_rows(name, split="train", instead="a file (there is none of that name)")
    rows = list(read_lines(path, parse) if table is None else numbered(source, table, parse))
    if not rows:
        raise ValueError(f"{source} holds no rows")
    return rows


def _listed(path: Path) -> list[dict] | None:
    """The rows of a file that is one JSON list; None where it is not."""
    with open(path, "rb") as f:
        if f.read(64).lstrip()[:1] != b"[":
            return None
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}): fetch or make it again") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is a list of other things than JSON objects")
    return rows


def row_query(row: dict) -> Query:
    """A row's query, with its question."""
    earlier = tuple((query, documents) for query, documents in row.get("earlier", ()))
    return Query(row["query"], Question(row["question"], (row["answer"],)), (), earlier)


# --------------------------------------------------------------------------------------------- the documents

DOCUMENT = re.compile(r"^Doc (\d+): ?", re.MULTILINE)


def bodies(documents: str) -> list[str]:
    """The documents one by one, without "Doc 1:"; a text without such marks is one document."""
    parts = DOCUMENT.split(documents)
    texts = parts[2::2] if len(parts) > 1 else parts
    return [text.strip() for text in texts if text.strip()]


def well_formed(documents: str, count: int) -> bool:
    """Whether these are exactly the lines "Doc 1: ..." to "Doc {count}: ...", none empty."""
    lines = documents.splitlines()
    marks = [f"Doc {i}: " for i in range(1, count + 1)]
    return len(lines) == count and all(a.startswith(b) and a != b for a, b in zip(lines, marks))


def shortened(search: Search, words: int) -> Search:
    """The same engine, each of its documents cut after so many words."""

    def short(query: Query):
        documents = yield from search(query)
        texts = (" ".join(text.split()[:words]) for text in bodies(documents.text))
        lines = [f"Doc {i}: {text}" for i, text in enumerate(texts, 1)]
        return replace(documents, text="\n".join(lines))

    return short


def stands(documents: str, golds: Iterable[str]) -> bool | None:
    """Whether a golden answer stands in the documents. None where it is yes or no: a text cannot hold it."""
    golds = [gold for gold in golds if normalise(gold) not in ("yes", "no")]
    return bool(cover_em(documents, golds)) if golds else None


def audit_figures(written: Iterable[tuple[Query, Documents]], count: int = 5) -> dict[str, dict[str, float]]:
    """How good a simulator is: for "useful" and for "noisy" documents, as they were asked for,

    n         outputs
    answer    share in which a golden answer stands (of questions that are not answered by yes or no)
    repeats   share that repeat the question
    distinct  share of all documents that are not copies of another
    words     a document
    formed    share of outputs that are exactly "Doc 1: ..." to "Doc {count}: ..."

    A good one has a high `answer` for useful and a low one for noisy. A quality that nobody asked for is
    absent, and so are `answer` where no question counts, and the figures of documents where there are none.
    """
    written = list(written)
    parts = {name: [(q, d.text) for q, d in written if d.noisy is noisy] for name, noisy in QUALITIES.items()}
    return {name: _figures(part, count) for name, part in parts.items() if part}


QUALITIES = {"useful": False, "noisy": True}


def _figures(written: list[tuple[Query, str]], count: int) -> dict[str, float]:
    held = [held for q, text in written if (held := stands(text, q.question.answers)) is not None]
    repeats = [bool(cover_em(text, [q.question.text])) for q, text in written]
    texts = [body for _, text in written for body in bodies(text)]
    n, figures = len(written), {"answer": sum(held) / len(held)} if held else {}
    figures = {"n": n} | figures | {"repeats": sum(repeats) / n}
    if texts:
        figures["distinct"] = len({normalise(text) for text in texts}) / len(texts)
        figures["words"] = sum(len(text.split()) for text in texts) / len(texts)
    return figures | {"formed": sum(well_formed(text, count) for _, text in written) / n}


# ------------------------------------------------------------------------------------------------- the judge

JUDGED = 4  # the judge's stream of randomness
VERDICT = 8  # tokens, within which yes or no must come


@dataclass(frozen=True)
class JudgeWords:
    """What the judge is asked (over {query}, {question}, {documents}), and what of its words is a verdict."""

    prompt: str
    yes: str = r"(?i)\byes\b"
    no: str = r"(?i)\bno\b"


JUDGE = JudgeWords("""\
Below is a search query, and what a search engine returned for it.
Query: {query}
{documents}

Do these documents hold enough information to answer the query? Reply with one word, Yes or No.
Reply:""")
# The toy world's body has been taught to read: what it is asked for, or "unknown".
TOY_JUDGE = JudgeWords("<information>{documents}</information>\n\n<think> {query}", r"\w", r"\bunknown\b")


def verdict(text: str, words: JudgeWords) -> bool | None:
    """What the judge said first, yes or no; None where it said neither."""
    yes, no = re.search(words.yes, text), re.search(words.no, text)
    if yes is None or no is None:
        return None if yes is no else yes is not None
    return yes.start() < no.start()


def judged(tok, words: JudgeWords, query: Query, documents: str, room: int) -> Generator:
    """A generator that asks the judge about one search: returns its verdict.

    Documents are cut until the prompt fits `room`; where the query leaves none for them, there is no verdict:
    None.
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

LABELS = ("judge", "answer", "trajectory")


@dataclass(frozen=True)
class Collector:
    """How episodes become rows. `search` is the real engine; `shown` changes what the policy reads of it.

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
        """One episode, then its judge: returns {"forced", "rows": [row with "labels"]}, for the log."""
        found: list[tuple[Query, Documents]] = []

        def noted(query: Query):
            documents = yield from self.search(query)
            found.append((query, documents))
            return documents

        reading = self.shown(noted) if self.shown else noted
        t = yield from episode(
            question, reading, self.tok, self.limits, self.words, self.temperature, address
        )
        forced = self.force and not found
        if forced:
            yield from noted(Query(question.text, question, (*address, 0)))
        reached = None if forced else bool(cover_em(t.answer, question.answers))
        rows = []
        for query, documents in found:
            says = yield from judged(self.tok, self.judge, query, documents.text, self.room)
            labels = {
                "judge": says,
                "answer": stands(documents.text, question.answers),
                "trajectory": reached,
            }
            rows.append(raw_row(query, documents.text) | {"labels": labels})
        return {"forced": forced, "rows": rows}


def raw_row(query: Query, documents: str) -> dict:
    """A row that has no quality yet. Its answer is the first golden one that stands in the documents."""
    question = query.question
    held = [gold for gold in question.answers if stands(documents, [gold])]
    row = {
        "query": query.text,
        "question": question.text,
        "answer": (held or question.answers)[0],
        "documents": documents,
    }
    return row | ({"earlier": [list(search) for search in query.earlier]} if query.earlier else {})


def collect(
    engine: Engine,
    collector: Collector,
    questions: list[Question],
    log: "Log",
    label: str,
    n: int,
    samples: int = 1,
    seed: int = 0,
    rounds: int = 64,
) -> "Sorted":
    """Episodes, until n // 2 rows of each quality are there or every question was asked `samples` times.

    Each episode has a number and an address of its own, so that it does not matter which of them are run
    together; those that stand in the log are not run again. rounds: episodes between two looks at the rows.
    """
    left = [i for i in range(samples * len(questions)) if i not in log.episodes]
    count = sort_rows(log.episodes, label)
    with tqdm(
        total=2 * (n // 2), initial=count.balanced(n), desc="collecting", unit=" rows", miniters=0
    ) as bar:

        def noted(i: int):
            number = i % len(questions)
            done = yield from collector.episode(questions[number], (seed, 0, number, i // len(questions)))
            log.add(i, done)
            bar.set_postfix_str(f"{len(log.episodes):,} episodes", refresh=False)
            bar.update(0)  # shows it, now and then

        while left and count.balanced(n) < 2 * (n // 2):
            engine.run([noted(i) for i in left[:rounds]])
            left, count = left[rounds:], sort_rows(log.episodes, label)
            bar.update(count.balanced(n) - bar.n)
    return count


@dataclass(frozen=True)
class Sorted:
    """The rows of a log by quality, in the order of their episodes, and how many were left aside, and why."""

    useful: list[dict]
    noisy: list[dict]
    aside: Counter  # undecided | empty | repeated

    def balanced(self, n: int) -> int:
        """Rows of a balanced set of at most n."""
        return 2 * min(len(self.useful), len(self.noisy), n // 2)

    def rows(self, n: int) -> list[dict]:
        """A balanced set of at most n rows, the first of each quality, one after the other."""
        half = self.balanced(n) // 2
        pairs = zip(self.useful[:half], self.noisy[:half])
        return [row for pair in pairs for row in pair]


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
    lines = [f"{'label':10}  useful   noisy  undecided"]
    lines += [f"{k:10}  {v.count(True):6d}  {v.count(False):6d}  {v.count(None):9d}" for k, v in said.items()]
    for a, b in combinations(LABELS, 2):
        both = [x == y for x, y in zip(said[a], said[b]) if None not in (x, y)]
        share = f"{sum(both) / len(both):.3f}" if both else "-"
        lines.append(f"{a} and {b} agree on {share} of {len(both)} rows")
    return "\n".join(lines)


class Log:
    """A file of episodes, one line each, the first line its settings. What stands in it is done.

    Raises ValueError where the file is another run's, or where there is one (or none) against `resume`.
    """

    def __init__(self, path: Path, settings: dict, resume: bool):
        if path.exists() != resume:
            what = (
                "is there already: add --resume to go on with it"
                if path.exists()
                else "holds nothing to resume"
            )
            raise ValueError(f"{path} {what}, or choose another --out")
        self.path, self.episodes = path, {}
        if resume:
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _read(self, settings: dict) -> None:
        """Episodes of an earlier run. A last line that was cut off is dropped from the file."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.path.write_bytes(whole)
        lines = read_lines(self.path, dict)
        old = next(lines, None)
        changed = [k for k in settings if old is None or settings[k] != old.get(k)]
        if changed:
            was = f"was begun with another --{changed[0].replace('_', '-')}"
            raise ValueError(f"{self.path} {was}: resume with the same, or choose another --out")
        self.episodes = {line["episode"]: line for line in lines}

    def add(self, number: int, done: dict) -> None:
        """Append an episode; when this returns it is with the operating system."""
        self.episodes[number] = {"episode": number} | done
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(self.episodes[number], ensure_ascii=False) + "\n")


def write_rows(rows: Iterator[dict] | list[dict], path: Path) -> None:
    """Write rows as `read_rows` reads them, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
