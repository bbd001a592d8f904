"""The ways to answer a question that evaluation compares: the search agent, and the paper's baselines.

agent    rollout.py's `episode`: think, search, read, as often as wanted
direct   the answer at once, from what the body remembers
cot      chain of thought: reason first, then answer
rag      one search, whose query is the question itself, then the answer

Each is a generator with the parameters of `episode`, so the engine runs them alike, and what a policy samples
is scored alike. A baseline's answer is what it samples after an `<answer>` that we open for it, up to the
closing tag: its first line that is not blank. Hence no baseline loses for its form what it knows; only the
agent has to find the tags by itself.

What this is not: an agent of another kind (Search-o1), or a search for the best words.

Source: the baselines of ZeroSearch, arXiv 2505.04588; it does not state their prompts, these words are ours.
"""

from collections.abc import Callable

import rollout
from model import POLICY
from rollout import TOKENS, Episode, Limits, Query, Question, Search, Trajectory, Turn, prompt
from words import Words

Address = tuple[int, ...]  # seed, step, question, sibling


def answer_room(limits: Limits) -> int:
    """Tokens that are kept for an answer, as in `episode`, which gives its last turn no less."""
    return min(limits.turn, 64)


def begin(question: Question, tok, words: Words, limits: Limits, documents: str = "") -> Trajectory:
    """A trajectory that holds the prompt. Documents are cut until question and answer have room beside them.

    Raises ValueError where the prompt is too long without any document.
    """
    frame = len(prompt(question, tok, words, documents=""))
    if frame > limits.prompt:
        raise ValueError(
            f"the prompt of question {question.text[:60]!r} has {frame} tokens, over {limits.prompt}"
        )
    room = max(0, min(limits.observation, limits.episode - frame - 2 * answer_room(limits)))
    kept = tok.encode(documents)
    if len(kept) > room:
        documents = tok.decode(kept[:room]).rstrip("\ufffd")  # a character may have been cut in two
    t = Trajectory(question)
    t.add(prompt(question, tok, words, documents=documents))
    return t


def turn(
    t: Trajectory, tok, given: str, stop: tuple[str, ...], most: int, temperature: float, address: Address
):
    """Add `given`, let the policy sample up to a stop or `most` tokens, add that, return its text."""
    fed = 0 if 1 not in t.mask else len(t.ids)
    t.add(tok.encode(given))
    sampled = yield Turn(t.ids[fed:], POLICY, most, temperature, stop, (*address, TOKENS), t)
    t.add(sampled.ids, sampled.logps)
    return tok.decode([i for i in sampled.ids if i not in tok.eos])


def answer(t: Trajectory, tok, given: str, limits: Limits, temperature: float, address: Address) -> Episode:
    """The last turn: what is sampled after `given`, which opens the answer, is the answer. Returns t."""
    most = min(answer_room(limits), limits.episode - len(t.ids) - len(tok.encode(given)))
    text = yield from turn(t, tok, given, ("</answer>",), most, temperature, address)
    lines = text.partition("</answer>")[0].strip().splitlines()
    t.answer, t.end = (lines[0].strip(), "answer") if lines else (None, "turns")
    return t


def direct(
    question: Question,
    search: Search,
    tok,
    limits: Limits,
    words: Words,
    temperature: float,
    address: Address,
) -> Episode:
    """The answer at once. The parameters, here and below, are those of `episode`; nothing is searched."""
    t = begin(question, tok, words, limits)
    return (yield from answer(t, tok, "<answer>", limits, temperature, (*address, 0)))


def cot(
    question: Question,
    search: Search,
    tok,
    limits: Limits,
    words: Words,
    temperature: float,
    address: Address,
) -> Episode:
    """Reason in an opened think block, one turn long at most; then answer, unless the turn already has."""
    t = begin(question, tok, words, limits)
    most = max(1, min(limits.turn, limits.episode - len(t.ids) - 2 * answer_room(limits)))
    stops = ("</think>", "</answer>")
    text = yield from turn(t, tok, "<think>", stops, most, temperature, (*address, 0))
    kind, found = rollout.action(text) or ("", "")
    if kind == "answer" and found:
        t.answer, t.end = found, "answer"
        return t
    given = "\n<answer>" if "</think>" in text else "</think>\n<answer>"
    return (yield from answer(t, tok, given, limits, temperature, (*address, 1)))


def rag(
    question: Question,
    search: Search,
    tok,
    limits: Limits,
    words: Words,
    temperature: float,
    address: Address,
) -> Episode:
    """Search once, with the question; answer from the documents, which stand in the prompt at {documents}."""
    query = Query(question.text, question, (*address, 0))
    documents = yield from search(query)
    t = begin(question, tok, words, limits, documents.text)
    t.searches.append((query, documents))
    return (yield from answer(t, tok, "<answer>", limits, temperature, (*address, 0)))


MODES: dict[str, Callable[..., Episode]] = {
    "agent": rollout.episode,
    "direct": direct,
    "cot": cot,
    "rag": rag,
}
