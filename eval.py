"""The truth: questions with golden answers, the scores, and a policy's answers measured with any search
engine.

"EM" here is strict: the normalised answer *is* a golden answer. The paper's code calls "EM" what is
`cover_em` here, a golden answer anywhere in the answer. Both are reported, and F1, which is also the reward
of training.

It deliberately is not: a judge, a sampler of favourites (greedy, unless told otherwise), a filter. Every
question counts, an episode without an answer too: as 0.

    python eval.py --policy 3b --adapter runs/x/policy --data hotpotqa.jsonl --search bm25:corpus.jsonl.gz
    python eval.py --data hotpotqa.jsonl --search bm25:corpus.jsonl.gz          # no policy: the engine alone
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from rollout import Question
from search import read_lines

# ----------------------------------------------------------------------------------------------------- scores

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles a / an / the, single spaces: SQuAD's and HotpotQA's
    definition.

    Punctuation goes first and leaves no space: "U.S." -> us, "well-known" -> wellknown. Unicode is left as it
    is.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(answer: str | None, golds: Iterable[str]) -> float:
    """Token F1, 2 * common / (tokens of the answer + tokens of the gold), within 0..1: the best over golden
    answers.

    Tokens are the words of the normalised texts, with multiplicity. yes, no and noanswer are words like any
    other (HotpotQA's own script gives "yes, it is" 0 against "yes"; here, as in the paper's reward, it gets
    .5).
    """
    return _best(_f1, answer, golds)


def exact_match(answer: str | None, golds: Iterable[str]) -> float:
    """1.0 where the normalised answer equals a normalised golden answer, else 0.0."""
    return _best(str.__eq__, answer, golds)


def cover_em(answer: str | None, golds: Iterable[str]) -> float:
    """1.0 where a normalised golden answer is a substring of the normalised answer, else 0.0.

    Characters, not whole words, so that figures compare with the paper's "EM" column, whose code does so.
    Hence "no" is found in "nothing", and a long enough answer is always right: read it beside the other two.
    """
    return _best(lambda answer, gold: gold != "" and gold in answer, answer, golds)


def _best(measure: Callable[[str, str], float], answer: str | None, golds: Iterable[str]) -> float:
    """The best over golds, all normalised. No answer (None, or nothing left of it) is 0 in every score."""
    said = normalise(answer or "")
    return max((float(measure(said, normalise(gold))) for gold in golds), default=0.0) if said else 0.0


def _f1(answer: str, gold: str) -> float:
    a, g = Counter(answer.split()), Counter(gold.split())
    return 2 * (a & g).total() / (a.total() + g.total())


# -------------------------------------------------------------------------------------------------- questions


def parse_question(row: dict) -> Question:
    """A row {"question", "golden_answers" | "answers" | "answer", and optionally "id", "hops"} -> Question.

    The answers are one text or a list of them. Raises ValueError where a row has no question or no answer.
    """
    text, hops = row.get("question"), row.get("hops", 0)
    if not isinstance(text, str) or not text.strip():
        raise ValueError('has no text under "question"')
    answers = next((row[k] for k in ("golden_answers", "answers", "answer") if k in row), [])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError('must have a text or a list of texts under "golden_answers"')
    answers = tuple(a for a in answers if a.strip())
    if not answers:
        raise ValueError('has no answer under "golden_answers"')
    if not isinstance(hops, int):
        raise ValueError(f'has {hops!r} under "hops", which is a number of searches')
    return Question(text, answers, str(row.get("id", "")), hops)


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions (None: all) of a JSON lines file, plain or gzip.

    Raises ValueError, with the line's number where one is broken or has no answer; OSError where there is no
    file.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least one question, not {limit}")
    questions = list(islice(read_lines(path, parse_question), limit))
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions
