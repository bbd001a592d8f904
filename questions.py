"""Questions with golden answers, and the scores of an answer against them.

"EM" here is strict: the normalised answer equals a golden answer. What the paper's code calls "EM" is
`cover_em` here: the answer contains a golden answer. These functions are the reward in training, the metric
in evaluation and a label of collected documents.

Not a judge of explanations, and not a filter: a broken line is an error that names its number.

    load_questions("hotpotqa")            # by name from the hub, or a file: JSON lines or parquet
    f1("the Eiffel Tower", ("Eiffel Tower", "La tour Eiffel"))
"""

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cli.disk import readable
from rollout import Question
from search import Row, read_lines

# ----------------------------------------------------------------------------------------------------- scores

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles a / an / the, single spaces: as SQuAD and HotpotQA do.

    Punctuation is deleted first and leaves no space: "U.S." -> us, "well-known" -> wellknown. Other
    characters stay.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(answer: str | None, golds: Iterable[str]) -> float:
    """Token F1 within 0..1, 2 * common / (tokens of the answer + tokens of the gold): the maximum over golds.

    Tokens are the words of the normalised texts, with multiplicity. yes and no are words like any other:
    "yes, it is" scores .5 against "yes", as in the paper's reward (0 in HotpotQA's script).
    """

    def overlap(answer: str, gold: str) -> float:
        a, g = Counter(answer.split()), Counter(gold.split())
        return 2 * (a & g).total() / (a.total() + g.total())

    return _best(overlap, answer, golds)


def exact_match(answer: str | None, golds: Iterable[str]) -> float:
    """1.0 if the normalised answer equals a normalised golden answer, else 0.0."""
    return _best(str.__eq__, answer, golds)


def cover_em(answer: str | None, golds: Iterable[str]) -> float:
    """1.0 if a normalised golden answer is a substring of the normalised answer, else 0.0.

    Characters, not whole words, as in the code behind the paper's "EM" column. So "nothing" holds "no", and a
    long answer is easily right: read this score together with the other two.
    """
    return _best(lambda answer, gold: gold != "" and gold in answer, answer, golds)


def holds_answer(documents: str, golds: Iterable[str]) -> bool | None:
    """Whether documents contain a golden answer (`cover_em`). None for yes / no, which no text proves."""
    golds = [gold for gold in golds if normalise(gold) not in ("yes", "no")]
    return bool(cover_em(documents, golds)) if golds else None


def _best(measure: Callable[[str, str], float], answer: str | None, golds: Iterable[str]) -> float:
    """The maximum over golds, all normalised. No answer (None, or empty when normalised) scores 0."""
    said = normalise(answer or "")
    return max((float(measure(said, normalise(gold))) for gold in golds), default=0.0) if said else 0.0


# -------------------------------------------------------------------------------------------------- questions


def parse_question(row: dict) -> Question:
    """A row {"question", "golden_answers" | "answers" | "answer", and optionally "id", "hops"} -> Question.

    The answers are one text or a list of texts. Raises ValueError for a row without a question or an answer.
    """
    text, hops = row.get("question"), row.get("hops", 0)
    if not isinstance(text, str) or not text.strip():
        raise ValueError('has no text under "question"')
    answers = next((row[k] for k in ("golden_answers", "answers", "answer") if k in row), [])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError('must have a text or a list of texts under "golden_answers"')
    if not (answers := tuple(a for a in answers if a.strip())):
        raise ValueError('has no answer under "golden_answers"')
    if not isinstance(hops, int):
        raise ValueError(f'has {hops!r} under "hops", which is a number of searches')
    return Question(text, answers, str(row.get("id", "")), hops)


HUB = "RUC-NLPIR/FlashRAG_datasets"  # on the Hugging Face hub, one configuration per set
SETS = {  # name -> training split, evaluation split
    "nq": ("train", "test"),
    "triviaqa": ("train", "test"),
    "popqa": (None, "test"),
    "hotpotqa": ("train", "dev"),
    "2wikimultihopqa": ("train", "dev"),
    "musique": ("train", "dev"),
    "bamboogle": (None, "test"),
}


def load_questions(source: str | Path, limit: int | None = None, train: bool = False) -> list[Question]:
    """The questions of a set of `SETS`, or of a file: JSON lines, plain or gzip, or parquet.

    limit: how many (None: all), sampled with a fixed seed and kept in the file's order; a smaller sample is
    part of a larger one. (The first `limit` are often of one kind.) Raises ValueError with the number of a
    row that is broken or has no answer; FileNotFoundError if `source` is neither a file nor a set.
    """
    name = str(source)
    if name in SETS and not Path(name).exists():
        if (split := SETS[name][0 if train else 1]) is None:
            raise ValueError(f"{name} has no questions to train on: it is a test set")
        rows = map(parse_question, hub_rows(HUB, name, split=split, instead="a question file"))
    elif not Path(name).exists():
        sets = "" if is_path(name) else f", and no such set ({', '.join(SETS)})"
        raise FileNotFoundError(f"there is no file {name}{sets}")
    elif is_parquet(source):
        rows = numbered(source, parquet_rows(source), parse_question)
    else:
        rows = read_lines(source, parse_question)
    if not (questions := list(rows)):
        raise ValueError(f"{source} holds no questions")
    numbers = random.Random(0).sample(range(len(questions)), len(questions))  # shuffled
    return [questions[i] for i in sorted(numbers[:limit])]


def is_path(name: str) -> bool:
    """Whether a name means a file, not a set on the hub: ./x, ~/x, /x, a/b/c, x.jsonl; not OWNER/SET_v1.5."""
    return re.match(r"[./~]|.*/.*/|.*\.[A-Za-z]\w*$", name) is not None


def is_parquet(path: str | Path) -> bool:
    """Whether a file begins with PAR1, as parquet does, whatever its name."""
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def parquet_rows(path: str | Path) -> list[dict]:
    """The rows of a parquet file. Raises ValueError if it is damaged."""
    from pyarrow import ArrowException, parquet  # it comes with datasets, and is slow to import

    try:
        rows, room = [], 2**26 + 100 * Path(path).stat().st_size  # characters: a dictionary may repeat a text
        for batch in parquet.ParquetFile(path).iter_batches(256):
            rows += (some := batch.to_pylist())
            room -= len(repr(some))  # nbytes would count a dictionary's text once
            if room < 0:
                raise OSError("it unpacks to more than 100 times its size")
        return rows
    except (ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({str(e).splitlines()[0]}): download or make it again") from None


def hub_rows(*where: str, split: str, instead: str) -> Iterable[dict]:
    """The rows of a set on the hub, or in its local cache; where: repository, and configuration if any.

    Raises ValueError if the download fails; its message says what to give instead.
    """
    from datasets import load_dataset  # not on every machine, and slow to import

    try:
        return load_dataset(*where, split=split)
    except Exception as e:  # the hub's client raises dozens of types for one failure
        what, reason = " from ".join(reversed(where)), (str(e).strip() or repr(e)).splitlines()[0]
        raise ValueError(f"could not download {what}: {reason}. Give {instead}") from None


def numbered(source: str | Path, rows: Iterable[dict], parse: Callable[[dict], Row]) -> Iterator[Row]:
    """Apply `parse` to each row, nulls dropped. Raises ValueError with the number of a broken row, from 1."""
    for number, row in enumerate(rows, 1):
        try:
            with readable("it"):
                parsed = parse({k: v for k, v in row.items() if v is not None})
        except ValueError as e:
            raise ValueError(f"{source}, row {number}: {e}") from None
        yield parsed
