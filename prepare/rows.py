"""Rows of the simulator's fine-tuning: {"query", "question", "answer", "documents", "quality"}, from a file.

Written by `simulator.py collect`, or the authors' released sets, whose rows are whole exchanges with a
simulator. Not a filter: a row that is not understood is an error with its number.
"""

import json
import re
from functools import partial
from pathlib import Path

from cli.disk import whole
from questions import holds_answer, hub_rows, is_parquet, is_path, numbered, parquet_rows
from rollout import Query, Question
from search import read_lines

COLUMNS = ("query", "question", "answer", "documents", "quality")
SAID = {"user": "prompt", "human": "prompt", "assistant": "documents", "gpt": "documents"}
# The prompts of the authors' code. Their released tuning sets hold such prompts with documents.
ASKED = re.compile(
    r'answer the question: "(?P<question>.*)" whose answer is (?P<answer>.*?)\.?[ \t]*\n'
    r".*^Query: (?P<query>.*?)\n(?P<quality>Useful|Noisy) Output:\s*\Z",
    re.DOTALL | re.MULTILINE,
)


def check_row(row: dict) -> dict:
    """The row itself. Raises ValueError with what is wrong with it."""
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            raise ValueError(f"no text in the column {column}")
    if row["quality"] not in ("useful", "noisy"):
        raise ValueError(f"quality is {row['quality']!r}: it must be useful or noisy")
    if unknown := sorted(row.keys() - {*COLUMNS, "earlier"}):
        raise ValueError(f"unknown columns: {', '.join(unknown)}")
    earlier = row.get("earlier", [])
    if not isinstance(earlier, list) or any(
        not isinstance(pair, list) or [*map(type, pair)] != [str, str] for pair in earlier
    ):
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
        layout = "'Query: ...' and 'Useful Output:' or 'Noisy Output:'"
        raise ValueError(f"its prompt does not end in {layout}: {' '.join(prompt[-80:].split())!r}")
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

    A row may also hold "earlier": [[query, documents], ...], the searches before it. A file is JSON lines
    (plain or gzip), a JSON list, or parquet; OWNER/NAME, where no such file exists, is a hub set. The columns
    of the authors' released sets (Alibaba-NLP/SimulationTuning_wiki_dataset, ..._google_dataset; a JSON file
    each) are documented nowhere: `exchange` and `released` guess them, `columns` overrides. (Their
    ZeroSearch_dataset holds questions, no documents.) Raises ValueError with file and
    line, or row; FileNotFoundError.
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
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}): fetch or make it again") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is a list of other things than JSON objects")
    return rows


def row_of(query: Query, documents: str) -> dict:
    """A row without a quality. Its answer is the first golden one in the documents, else the first."""
    answers = query.question.answers
    answer = next((gold for gold in answers if holds_answer(documents, [gold])), answers[0])
    row = {"query": query.text, "question": query.question.text, "answer": answer, "documents": documents}
    return row | ({"earlier": [list(search) for search in query.earlier]} if query.earlier else {})


def row_query(row: dict) -> Query:
    """The query of a row, with its question."""
    question = Question(row["question"], (row["answer"],))
    return Query(row["query"], question, (), tuple(map(tuple, row.get("earlier", ()))))


def write_rows(rows: list[dict], path: Path) -> None:
    """Write rows as `read_rows` reads them, whole or not at all."""
    with whole(path) as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
