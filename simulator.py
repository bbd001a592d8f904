"""An LLM as the search engine, the noise curriculum, and the audit of such a simulator.

A `Simulator` is a *search* (see rollout.py): called with a query it yields one turn in the role SIMULATOR and
returns that turn's text as documents, useful or noisy as a seeded coin decides. The engine of rollout.py
samples these turns in the same batch as the policy's.

Not a server, not a cache, and not a filter of what was written. Preparing a simulator (collecting rows,
fine-tuning) is in prepare/, and part of this command:

    python simulator.py collect --policy 3b --data nq,hotpotqa --search bm25:corpus.jsonl.gz --rows 10000 \\
        --judge judge --out rows.jsonl
    python simulator.py sft --sim 3b --rows rows.jsonl --out runs/simulator
    python simulator.py audit --sim 3b --sim-adapter runs/simulator --rows held_out.jsonl
    python simulator.py write --sim 3b --sim-adapter runs/simulator --query ... --question ... --answer ...

Source: ZeroSearch, arXiv 2505.04588 (simulator, curriculum).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cli import ranks
from cli.screen import bar, move
from engine import Engine
from model import SIMULATOR, Model
from questions import cover_em, holds_answer, normalise
from rollout import DOCUMENTS, Documents, Query, Turn, coin, uniforms
from search import content, split_documents
from servers import Chat
from tokenizer import Tokenizer
from words import SFT_WORDS, SimWords, fill

# ------------------------------------------------------------------------------------------------- simulating


def messages(words: SimWords, query: Query, noisy: bool) -> list[dict[str, str]]:
    """The chat messages that ask for documents for `query`. Every caller gets them here.

    Question and answer are the query's own. Of several golden answers the *first* goes in: data sets list the
    canonical form first, and a list of aliases would teach the simulator to write lists.
    """
    message = fill(
        words.noisy if noisy else words.useful,
        query=query.text,
        question=query.question.text,
        answer=query.question.answers[0],
        earlier="".join(fill(words.earlier, query=q, documents=d) for q, d in query.earlier),
    )
    return [{"role": "system", "content": words.system}, {"role": "user", "content": message}]


def prompt(tok: Tokenizer, words: SimWords, query: Query, noisy: bool) -> list[int]:
    """The same as ids: with the checkpoint's chat template if it has one, else as plain text."""
    return tok.chat(messages(words, query, noisy))


def clean(text: str, count: int) -> str:
    """Sampled text -> documents: cut before "Doc {count + 1}", no blank lines, no blanks around a line."""
    lines = text.split(f"Doc {count + 1}", 1)[0].splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def p_noise(
    step: int, steps: int, start: float, end: float, shape: str = "exponential", base: float = 4.0
) -> float:
    """The curriculum: the probability that a search at `step` of `steps`, from 0 to `steps` inclusive.

    exponential   start + (base^(step/steps) - 1) / (base - 1) * (end - start), the paper's
    linear        start + step/steps * (end - start)
    constant      the exponential's mean over the run: ablates the order, with as much noise in all
    reverse       the exponential, from end to start
    Raises ValueError for noise outside 0..1, a step outside the run, an unknown shape or a bad base.
    """
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"noise is a probability, within 0..1, not {start} to {end}")
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step {step} lies outside a curriculum of {steps} steps")
    if base <= 0 or base == 1:
        raise ValueError(f"the curriculum's base must be positive and not 1, not {base} (for a line: linear)")
    if shape == "reverse":
        start, end, shape = end, start, "exponential"
    risen = {
        "exponential": (base ** (step / steps) - 1) / (base - 1),
        "linear": step / steps,
        "constant": 1 / math.log(base) - 1 / (base - 1),  # the integral of the first; .388 for base 4
    }
    if shape not in risen:
        raise ValueError(f"unknown curriculum {shape!r}: choose {', '.join(risen)} or reverse")
    return start + risen[shape] * (end - start)


def noise_coin(address: tuple[int, ...], shared: bool) -> float:
    """A uniform number for the search at (seed, step, question, sibling, call); shared: one for all siblings.

    Shared coins give every trajectory of a group the same luck at its n-th search, so that advantages compare
    what the policy did, and not what the engine happened to return.
    """
    *group, _, call = address
    return coin((*group, call) if shared else address)


def covered(query: Query) -> float:
    """The share of the question's content words that the episode's queries have asked for so far."""
    wanted = content(query.question.text)
    asked = content(" ".join([query.text, *(text for text, _ in query.earlier)]))
    return len(wanted & asked) / len(wanted) if wanted else 1.0


@dataclass(frozen=True)
class Simulator:
    """An LLM as a search engine: `yield from simulator(query)` gives Documents.

    p_noise       probability of noisy documents; `dataclasses.replace(sim, p_noise=...)` at each step
    shared        the siblings of a group share their coins, search by search
    limit         maximum tokens of one output; the default is the paper's
    temperature   of sampling; the default is the paper's
    server        if given, this server's LLM is asked, instead of a body in this process; `tok` is unused
    heed          0: useful documents come whatever is asked; 1: with the probability `covered`, so that a
                  query has to ask for what the question needs, as with a real engine; 2: with its square, ...
    """

    tok: Tokenizer | None
    words: SimWords = SFT_WORDS
    p_noise: float = 0.0
    shared: bool = False
    limit: int = 600
    temperature: float = 0.8
    server: Chat | None = None
    heed: float = 0.0

    def __post_init__(self):
        if not 0 <= self.p_noise <= 1:
            raise ValueError(f"noise is a probability, within 0..1, not {self.p_noise}")

    def __call__(self, query: Query):
        useful = (1 - self.p_noise) * covered(query) ** self.heed
        noisy = noise_coin(query.address, self.shared) < 1 - useful
        stops, address = (f"Doc {self.words.count + 1}",), (*query.address, DOCUMENTS)
        if self.server:
            asked, seed = messages(self.words, query, noisy), int(uniforms(address, 1)[0] * 2**31)
            text = yield self.server.complete(asked, self.temperature, self.limit, seed, stops)
        else:
            asked = prompt(self.tok, self.words, query, noisy)
            sampled = yield Turn(asked, SIMULATOR, self.limit, self.temperature, stops, address)
            text = self.tok.decode([i for i in sampled.ids if i not in self.tok.eos])
        return Documents(clean(text, self.words.count), noisy)


# -------------------------------------------------------------------------------------------------- the audit


def write(
    engine: Engine, simulator: Simulator, queries: list[Query], noisy: bool, label: str = "writing"
) -> list[Documents]:
    """The documents that the simulator writes for queries, all useful or all noisy."""
    search = replace(simulator, p_noise=float(noisy))
    mine = queries[ranks.part()]
    with bar(label, len(mine), "outputs") as shown:
        written = engine.run(map(search, mine), lambda done, of, stats: move(shown, done))
    return ranks.gathered(written)


def engine_for(
    body: Model | None, simulator: Simulator, queries: list[Query], seats: int, pages: int = 0
) -> Engine:
    """An engine for the simulator alone, its seats just long enough. body None: it runs on a server."""
    if body is None:
        return Engine({}, seats, 1)
    asked = (prompt(simulator.tok, simulator.words, q, noisy) for q in queries for noisy in (False, True))
    capacity = min(max(map(len, asked)) + simulator.limit + 1, len(body.cos))
    return Engine({SIMULATOR: (body, simulator.tok)}, seats, capacity, pages=pages)


def addressed(queries: list[Query], seed: int) -> list[Query]:
    """The queries, each with its own address, the seed of its random numbers."""
    return [replace(query, address=(seed, 0, i, 0, 0)) for i, query in enumerate(queries)]


def audit(
    engine: Engine, simulator: Simulator, queries: list[Query], label: str = "audit"
) -> dict[str, dict[str, float]]:
    """`audit_figures` of documents written for held-out queries, for each once useful and once noisy."""
    both = [
        (q, d)
        for noisy in (False, True)
        for q, d in zip(queries, write(engine, simulator, queries, noisy, label))
    ]
    return audit_figures(both, simulator.words.count)


def well_formed(documents: str, count: int) -> bool:
    """Whether these are exactly the lines "Doc 1: ..." to "Doc {count}: ...", none empty."""
    lines = documents.splitlines()
    marks = [f"Doc {i}: " for i in range(1, count + 1)]
    return len(lines) == count and all(a.startswith(b) and a != b for a, b in zip(lines, marks))


QUALITIES = {"useful": False, "noisy": True}


def audit_figures(written: Iterable[tuple[Query, Documents]], count: int = 5) -> dict[str, dict[str, float]]:
    """How good a simulator is, separately for outputs that were to be "useful" and to be "noisy":

    n         outputs
    answer    share of outputs with a golden answer in them (yes/no questions excluded)
    repeats   share of outputs that repeat the question
    distinct  different documents / all documents
    words     mean words per document
    formed    share of outputs that are exactly "Doc 1: ..." to "Doc {count}: ..."

    A good simulator has a high `answer` for useful and a low one for noisy. A quality without outputs is
    absent; so is `answer` without a question that counts, and `distinct` and `words` without documents.
    """
    written = list(written)
    parts = {name: [(q, d.text) for q, d in written if d.noisy is noisy] for name, noisy in QUALITIES.items()}
    return {name: _figures(part, count) for name, part in parts.items() if part}


def _figures(written: list[tuple[Query, str]], count: int) -> dict[str, float]:
    held = [held for q, text in written if (held := holds_answer(text, q.question.answers)) is not None]
    repeats = [bool(cover_em(text, [q.question.text])) for q, text in written]
    texts = [body for _, text in written for body in split_documents(text)]
    n, figures = len(written), {"answer": sum(held) / len(held)} if held else {}
    figures = {"n": n} | figures | {"repeats": sum(repeats) / n}
    if texts:
        figures["distinct"] = len({normalise(text) for text in texts}) / len(texts)
        figures["words"] = sum(len(text.split()) for text in texts) / len(texts)
    return figures | {"formed": sum(well_formed(text, count) for _, text in written) / n}


if __name__ == "__main__":
    from cli import screen
    from prepare.command import main  # here, because prepare/ imports this file

    screen.run(main)
