"""Traces: episodes as text, one line of JSON each, from which a policy can be fine-tuned.

    {"question": "who wrote Emma", "golden_answers": ["Jane Austen"], "f1": 1.0, "spans":
     [["sampled", "<search> wrote Emma </search>"], ["documents", "Doc 1: ..."], ["sampled", "<answer> ..."]]}

`simulator.py collect` writes them (its log of episodes), cold.py scripts and learns them. Not ids: another
body than the one that made a trace can learn it. The prompt is not part of it: the learner has its own.
"""

from itertools import islice

from prepare.sft import Example
from rollout import Limits, Question, Trajectory, observation, opened
from tokenizer import Tokenizer
from words import Words

SPANS = ("sampled", "documents", "given")  # given: the notice after an invalid turn


def spans_of(t: Trajectory, tok: Tokenizer) -> list[list[str]]:
    """A finished episode as the spans of a trace: what follows its prompt, cut where the mask changes."""
    out, searches = [], iter(t.searches)
    for sampled, ids in islice(t.stretches(), 1, None):
        text = tok.decode(ids)
        if sampled:
            out.append(["sampled", text])
        elif text.startswith("\n\n<information>"):
            out.append(["documents", next(searches)[1].text])
        else:
            out.append(["given", text])
    return out


def parse_trace(row: dict) -> dict:
    """The row itself; {} for the first line of `collect`'s log. Raises ValueError with what is wrong."""
    if row.keys() == {"flags"}:
        return {}
    spans = row.get("spans")
    if not isinstance(row.get("question"), str) or not isinstance(spans, list):
        raise ValueError('is no trace: it has no text under "question", or no list under "spans"')
    if not all(isinstance(s, list) and [*map(type, s)] == [str, str] and s[0] in SPANS for s in spans):
        raise ValueError(f"has a span that is not [KIND, TEXT], where KIND is one of {', '.join(SPANS)}")
    if type(row.get("f1", 1.0)) not in (int, float):
        raise ValueError('has no number under "f1"')
    if not any(kind == "sampled" and text for kind, text in spans):
        raise ValueError("has nothing sampled, so nothing to learn")
    return row


def example(tok: Tokenizer, words: Words, limits: Limits, row: dict) -> Example:
    """A trace as ids: the prompt and the observations as an episode has them, and what the policy said."""
    t = opened(Question(row["question"], ()), tok, words, limits)
    for what, text in row["spans"]:
        ids = observation(tok, text, limits.observation) if what == "documents" else tok.encode(text)
        t.add(ids, [0.0] * len(ids) if what == "sampled" else None)
    return Example(t.ids, t.mask)
