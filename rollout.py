"""The episode: think, search, read, answer, told in the order in which it happens.

An episode is a generator. It yields a `Turn` when it wants tokens and is sent what was sampled; a search may
yield turns of its own (in the simulator's role) or a future (of a real search engine).

Not what runs it: engine.py seats the turns of all episodes and decodes them together.

    trajectories = engine.run([episode(question, search, tok) for question in questions])
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count, groupby

import numpy as np

from model import POLICY
from words import WORDS, Words, fill

# ------------------------------------------------------------------------------------------------------ types


@dataclass(frozen=True)
class Question:
    """A question and its golden answers. `hops` is 0 where nobody said."""

    text: str
    answers: tuple[str, ...]
    id: str = ""
    hops: int = 0


@dataclass(frozen=True)
class Query:
    """What the policy asks the search engine. It carries its question, so nothing is paired by position."""

    text: str
    question: Question
    address: tuple[int, ...] = (0, 0, 0, 0, 0)  # seed, step, question, sibling, call
    earlier: tuple[tuple[str, str], ...] = ()  # (query, documents) of the same episode


@dataclass(frozen=True)
class Documents:
    """What a search engine returned. `noisy`: what a simulator was asked for; None from a real one."""

    text: str
    noisy: bool | None = None


@dataclass(frozen=True)
class Turn:
    """A request for tokens: feed `ids`, then sample until a stop, an end-of-turn token, or `limit` tokens.

    Turns of one `context` share a seat, so nothing in the cache is fed twice; without one, a turn has a seat
    to itself while it lasts. before: the ids that this turn continues, in which a stop may begin.
    """

    ids: list[int]
    role: int
    limit: int
    temperature: float
    stops: tuple[str, ...]
    address: tuple[int, ...]  # of the randomness: one uniform a token
    context: object = None
    before: Sequence[int] = ()


@dataclass(frozen=True)
class Sampled:
    """The answer to a Turn: the sampled ids (the stop included), their log-probs, and why it ended."""

    ids: list[int]
    logps: list[float]
    end: str  # stop | eos | limit


Search = Callable[[Query], Generator[Turn | Future, object, Documents]]
Episode = Generator[Turn | Future, object, object]


@dataclass(frozen=True)
class Limits:
    """In tokens, except `turns`: searches or invalid turns before the last turn, which can only answer."""

    prompt: int = 2048
    episode: int = 4096
    turn: int = 500
    observation: int = 500
    turns: int = 5


# --------------------------------------------------------------------------------- randomness with an address

TOKENS, DOCUMENTS, COIN = 1, 2, 3  # streams: the policy's tokens, the simulator's, the noise coins


def uniforms(address: tuple[int, ...], n: int) -> np.ndarray:
    """n uniforms in [0, 1) that depend only on the address (seed, step, question, sibling, call, stream),
    non-negative integers. A longer request begins with the same numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(address))).random(n)


def coin(address: tuple[int, ...]) -> float:
    """One uniform in [0, 1) of the coin stream at (seed, step, question, sibling, call)."""
    return float(uniforms((*address, COIN), 1)[0])


# ------------------------------------------------------------------------------------------------ the episode


@dataclass
class Trajectory:
    """One episode. The ids are the truth, and each token gets its mask from the only writer, `add`."""

    question: Question
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the policy
    logps: list[float] = field(default_factory=list)  # of sampled tokens when they were sampled, else 0
    searches: list[tuple[Query, Documents]] = field(default_factory=list)
    invalid: int = 0  # turns without an action
    answer: str | None = None
    end: str = ""  # answer | turns | tokens

    def add(self, ids: list[int], logps: list[float] | None = None) -> None:
        """Append tokens: sampled ones come with their log-probs, given ones without."""
        self.ids += ids
        self.mask += [int(logps is not None)] * len(ids)
        self.logps += [0.0] * len(ids) if logps is None else logps

    def stretches(self) -> Iterator[tuple[bool, list[int]]]:
        """(whether sampled, ids) of each stretch of tokens of one kind, from the prompt on."""
        for sampled, run in groupby(zip(self.mask, self.ids), lambda token: token[0]):
            yield bool(sampled), [i for _, i in run]


TAG = re.compile(r"<(/?)(think|search|answer)>")
STOPS = ("</search>", "</answer>")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each search or answer block, ("open", "") for a query that is not closed.

    A closed thought is skipped with all it holds, inner thoughts included; one that is never closed (base
    models) hides nothing.
    """
    at, closed = 0, closings(text)
    last = {kind: text.rfind(f"</{kind}>") for kind in ("search", "answer")}
    while tag := TAG.search(text, at):
        at, kind = tag.end(), tag[2]
        if tag[1]:
            continue  # it closes nothing
        if kind == "think":
            at = closed.get(at, at)
        elif at <= last[kind]:
            end = text.index(f"</{kind}>", at)
            yield kind, text[at:end].strip()
            at = end
        elif kind == "search":
            yield "open", ""


def closings(text: str) -> dict[int, int]:
    """Where each closed thought begins, after its tag, and where it ends, after its closing tag."""
    opened, closed = [], {}
    for tag in TAG.finditer(text):
        if tag[2] == "think" and not tag[1]:
            opened.append(tag.end())
        elif tag[2] == "think" and opened:
            closed[opened.pop()] = tag.end()
    return closed


def action(text: str) -> tuple[str, str] | None:
    """Kind and text of the first whole search or answer block of a sampled turn, or None."""
    found = next((block for block in blocks(text) if block[0] != "open"), None)
    return None if found == ("search", "") else found


def whole(turn: Turn, tok) -> Generator:
    """Sample a turn of the policy. A query may hold an answer block: only </search> ends it."""
    sampled = yield turn
    while sampled.end == "stop" and (n := len(sampled.ids)) < turn.limit:
        if next(blocks(tok.decode(sampled.ids)), ("",))[0] != "open":
            break
        address, said = (*turn.address, n), sampled.ids
        more = yield replace(turn, ids=[], limit=turn.limit - n, address=address, before=said)
        sampled = Sampled(said + more.ids, sampled.logps + more.logps, more.end)
    return sampled


def stopped(ids: Sequence[int], stops: tuple[str, ...], tok) -> bool:
    """Whether the last of a turn's ids completes a stop, which may begin or end inside a merged token."""
    tail = ids[-max((len(s.encode()) for s in stops), default=1) :]  # a token is one byte at least
    text, before = tok.decode(tail), tok.decode(tail[:-1])
    return any(text.count(s) > before.count(s) for s in stops)


def ask(text: str) -> str:
    """A question as it goes into a prompt: stripped, with a question mark."""
    text = text.strip()
    return text if text.endswith("?") else text + "?"


def prompt(question: Question, tok, words: Words, **more: str) -> list[int]:
    """The ids that an episode starts from. more: values of other {places} in the words' prompt."""
    messages = [{"role": "system", "content": words.system}] if words.system is not None else []
    content = fill(words.prompt, question=ask(question.text), **more)
    return tok.chat([*messages, {"role": "user", "content": content}])


def opened(question: Question, tok, words: Words, limits: Limits, **more: str) -> Trajectory:
    """A trajectory that holds its prompt. Raises ValueError for one over the limit: it is never cut."""
    t = Trajectory(question)
    t.add(prompt(question, tok, words, **more))
    if (n := len(t.ids)) > limits.prompt:
        shown = repr(question.text[:60])
        raise ValueError(f"the prompt of question {shown} has {n} tokens, over {limits.prompt}")
    return t


def observation(tok, documents: str, limit: int) -> list[int]:
    """The ids of an information block. Documents are cut to fit; the tags always close."""
    head, tail = tok.encode("\n\n<information>"), tok.encode("</information>\n\n")
    return head + tok.encode(documents)[: max(0, limit - len(head) - len(tail))] + tail


def recalled(t: Trajectory, tok, limit: int, turn: Turn) -> Generator:
    """Documents that the policy writes itself, in place of a search engine (SSRL, arXiv 2508.10874): sampled
    in the seat of `turn`, but given as far as the mask is concerned. Returns them, and the tokens now fed."""
    head, closing = tok.encode("\n\n<information>"), "</information>"
    limit -= len(observation(tok, "", 0))
    if limit < 1:
        t.add(observation(tok, "", 0))
        return Documents(""), len(t.ids) - len(observation(tok, "", 0))
    t.add(head)
    address = (*turn.address[:-1], DOCUMENTS)
    sampled = yield replace(turn, ids=head, limit=limit, stops=(closing,), address=address)
    t.add(sampled.ids)
    fed = len(t.ids)
    t.add(tok.encode("\n\n" if sampled.end == "stop" else f"{closing}\n\n"))
    return Documents(tok.decode(sampled.ids).partition(closing)[0]), fed


def episode(
    question: Question, search: Search | None, tok, limits: Limits = Limits(), words: Words = WORDS,
    temperature: float = 1.0, address: tuple[int, ...] = (0, 0, 0, 0),
) -> Episode:  # fmt: skip
    """One trajectory, told in the order in which it happens. address: (seed, step, question, sibling).
    search None: the policy writes its own documents.

    Only what the policy sampled in the current turn is parsed: prompts and documents may hold any tag. Near
    the length limit documents are cut, so that there is always room for an answer.
    """
    t = opened(question, tok, words, limits)
    notice, frame = tok.encode(words.notice), len(observation(tok, "", 0))
    answer_room = min(limits.turn, 64)
    fed = 0
    for call in count():
        room = limits.episode - len(t.ids)
        spare = room - answer_room - max(frame, len(notice))  # for this turn, if another is to follow
        last = call == limits.turns or spare < answer_room
        limit = min(limits.turn, room if last else spare)
        turn = Turn(t.ids[fed:], POLICY, limit, temperature, STOPS, (*address, call, TOKENS), context=t)
        sampled = yield from whole(turn, tok)
        t.add(sampled.ids, sampled.logps)
        fed = len(t.ids)
        kind, text = action(tok.decode(sampled.ids)) or ("invalid", "")
        t.invalid += kind == "invalid"
        if kind == "answer":
            t.answer, t.end = text, "answer"
            return t
        if last:
            t.end = "turns" if call == limits.turns else "tokens"
            return t
        if kind == "search":
            earlier = tuple((q.text, d.text) for q, d in t.searches)
            query = Query(text, question, (*address, call), earlier)
            room = min(limits.observation, limits.episode - len(t.ids) - answer_room)
            if search is None:
                documents, fed = yield from recalled(t, tok, room, turn)
            else:
                documents = yield from search(query)
                t.add(observation(tok, documents.text, room))
            t.searches.append((query, documents))
        else:
            t.add(notice)
