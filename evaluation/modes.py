"""The modes that evaluation compares: the search agent, and the paper's baselines.

agent    rollout.py's `episode`: think, search and read as often as wanted, then answer
direct   answer at once, from memory
cot      chain of thought: reason first, then answer
rag      one search, whose query is the question itself, then the answer

Each is a generator with the parameters of `episode`: the engine runs and the metric scores them alike. A
baseline's answer is the first non-blank line that it samples after an `<answer>` that we open for it, up to
the closing tag. So a baseline loses nothing by its form; only the agent must find the tags.

Not another kind of agent (Search-o1), no search for the best words.

Source: the baselines of ZeroSearch, arXiv 2505.04588; it does not state their prompts, these words are ours.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import rollout
from model import POLICY
from rollout import TOKENS, Episode, Limits, Query, Question, Search, Trajectory, Turn, opened, prompt
from words import Words


@dataclass(frozen=True)
class Baseline:
    """One question in one of the modes; the parameters are those of `episode`."""

    question: Question
    search: Search
    tok: object
    limits: Limits
    words: Words
    temperature: float
    address: tuple[int, ...]  # seed, step, question, sibling

    def direct(self) -> Episode:
        """Answer at once; nothing is searched."""
        return (yield from self.answer(self.begin(), "<answer>", 0))

    def cot(self) -> Episode:
        """Reason in an opened think block, for at most a turn; then answer, unless the turn has done so."""
        t = self.begin()
        most = max(1, min(self.limits.turn, self.limits.episode - len(t.ids) - 2 * self.room))
        text = yield from self.turn(t, "<think>", ("</think>", "</answer>"), most, 0)
        kind, found = rollout.action(text) or ("", "")
        if kind == "answer" and found:
            t.answer, t.end = found, "answer"
            return t
        return (yield from self.answer(t, "\n<answer>" if "</think>" in text else "</think>\n<answer>", 1))

    def rag(self) -> Episode:
        """Search once, with the question; answer from the documents, which the prompt has at {documents}."""
        query = Query(self.question.text, self.question, (*self.address, 0))
        documents = yield from self.search(query)
        t = self.begin(documents.text)
        t.searches.append((query, documents))
        return (yield from self.answer(t, "<answer>", 0))

    @property
    def room(self) -> int:
        """Tokens that are kept for an answer, as in `episode`, whose last turn gets no less."""
        return min(self.limits.turn, 64)

    def begin(self, documents: str = "") -> Trajectory:
        """A trajectory that holds the prompt. Documents are cut to leave room for question and answer.

        Raises ValueError where the prompt is too long without any document.
        """
        empty = opened(self.question, self.tok, self.words, self.limits, documents="")
        kept, spare = self.tok.encode(documents), self.limits.episode - len(empty.ids) - 2 * self.room
        if len(kept) > (most := max(0, min(self.limits.observation, spare))):
            documents = self.tok.decode(kept[:most]).rstrip("\ufffd")  # a character may have been cut in two
        t = Trajectory(self.question)
        t.add(prompt(self.question, self.tok, self.words, documents=documents))
        return t

    def turn(self, t: Trajectory, given: str, stops: tuple[str, ...], most: int, call: int) -> Generator:
        """Add `given`, let the policy sample up to a stop or `most` tokens, add that, return its text."""
        fed = 0 if 1 not in t.mask else len(t.ids)
        t.add(self.tok.encode(given))
        address = (*self.address, call, TOKENS)
        sampled = yield Turn(t.ids[fed:], POLICY, most, self.temperature, stops, address, t)
        t.add(sampled.ids, sampled.logps)
        return self.tok.decode([i for i in sampled.ids if i not in self.tok.eos])

    def answer(self, t: Trajectory, given: str, call: int) -> Episode:
        """The last turn: what is sampled after `given`, which opens the answer, is the answer. Returns t."""
        most = min(self.room, self.limits.episode - len(t.ids) - len(self.tok.encode(given)))
        text = yield from self.turn(t, given, ("</answer>",), most, call)
        lines = text.partition("</answer>")[0].strip().splitlines()
        t.answer, t.end = (lines[0].strip(), "answer") if lines else (None, "turns")
        return t


MODES: dict[str, Callable[..., Episode]] = {
    "agent": rollout.episode,
    "direct": lambda *given: Baseline(*given).direct(),
    "cot": lambda *given: Baseline(*given).cot(),
    "rag": lambda *given: Baseline(*given).rag(),
}
