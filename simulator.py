"""The world: the words that make an LLM a search engine, the noise curriculum, and the simulator's fine-tuning.

A `Simulator` is a *search* (see rollout.py): called with a query it yields one turn in the role SIMULATOR and returns
that turn's text as documents, useful or noisy by a keyed coin. The prompt that it sends is made by `prompt`, and by
nothing else: sampling and fine-tuning cannot drift apart.

It deliberately is not: a server, a client, a cache, or a judge of what it wrote. The engine of rollout.py samples its
turns in the same batch as the policy's; who wants other documents brings another search.

    python simulator.py write --sim 0.5b --query "capital of Peru" --question "What is the capital of Peru?" --answer Lima
    python simulator.py sft --sim 0.5b --rows rows.jsonl --out runs/simulator
    python simulator.py write --sim 0.5b --adapter runs/simulator --query ...

Source: ZeroSearch, arXiv 2505.04588, sections 3.2 (simulator) and 3.4 (curriculum). The words are our own.
"""

import argparse
import json
import math
import random
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

import model as models
from kernels import linear_logp
from model import SIMULATOR, Model
from rollout import Documents, Engine, Query, Question, Turn, coin, fill
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------- words

TASK = """\
You are a search engine, and the query at the end has just reached you. Write five {quality} documents for it, the \
ones that you would return: """
USEFUL = TASK + "they are about what the query asks, and whoever reads them can answer it."
NOISY = TASK + "they look related to the query, but whoever reads them still cannot answer it."
BACKGROUND = """\
What the user is after (for your eyes only):
Question: {question}
Correct answer: {answer}"""
FORM = """\
A document is a passage of about 30 words, in the manner of an encyclopedia or a web page. Put each on a line of its \
own, numbered "Doc 1: ..." to "Doc 5: ...", and write nothing else. All five documents must be {quality}."""
ASK = """\
Query: {query}
{Quality} Output:
"""
USEFUL_EXAMPLE = """\
Here is an example.
Question: Which river flows through the capital of Slovenia?
Correct answer: Ljubljanica
Query: river in Ljubljana
Useful Output:
Doc 1: The Ljubljanica flows through the middle of Ljubljana, the capital of Slovenia, and is crossed there by the \
Triple Bridge and the Dragon Bridge before it joins the Sava east of the city.
Doc 2: Ljubljana lies between the Alps and the Adriatic. Its old town grew up between Castle Hill and the river \
Ljubljanica, whose embankments were laid out anew in the 1930s.
Doc 3: The Ljubljanica is called the river of seven names: south-west of Ljubljana it disappears into the karst again \
and again, and comes back to the surface each time under another name.
Doc 4: Boats on the Ljubljanica leave from the centre of Ljubljana, pass the covered market and the Cobblers' Bridge, \
and take about an hour for the round trip.
Doc 5: Divers have raised thousands of objects from the bed of the Ljubljanica upstream of Ljubljana, among them Roman \
swords, Bronze Age helmets and medieval tools.

Now it is your turn."""
NOISY_EXAMPLE = """\
Here is an example.
Query: river in Ljubljana
Noisy Output:
Doc 1: Ljubljana became the capital of independent Slovenia in 1991. It has about 300,000 inhabitants, a university \
founded in 1919, and a castle on a wooded hill above the old town.
Doc 2: The Danube passes through four capitals, Vienna, Bratislava, Budapest and Belgrade, on its way from the Black \
Forest to the Black Sea, more than any other river.
Doc 3: Legend has it that Ljubljana was founded by Jason, who killed a dragon in a marsh nearby. The dragon has stood \
in the city's coat of arms ever since.
Doc 4: Slovenia is a land of forests and caves. Postojna Cave, 24 kilometres long, has been shown to visitors since \
1819 and is toured on an electric train.
Doc 5: The Ljubljana Marathon is run each October. Its course starts and ends in the city centre and draws runners \
from dozens of countries.

Now it is your turn."""


@dataclass(frozen=True)
class SimWords:
    """What the simulator is told: a system message and two whole user messages, one for each quality.

    `useful` and `noisy` are templates over {query}, {question}, {answer} and {earlier}; only {query} is required. Other
    braces are literal. Where the tokenizer has no chat template the texts themselves are the prompt. `count` is the
    number of documents that they ask for. {earlier} becomes one copy of the template `earlier`, over {query} and
    {documents}, for each search that the episode made before this one, oldest first. ValueError for bad words.
    """

    system: str
    useful: str
    noisy: str
    count: int = 5
    earlier: str = "Query: {query}\n{documents}\n\n"

    def __post_init__(self):
        for name in ("useful", "noisy"):
            if "{query}" not in getattr(self, name):
                raise ValueError(f"the simulator's {name} prompt has no {{query}}: say where the query goes")
        if self.count < 1:
            raise ValueError(f"a simulator must write at least one document, not {self.count}")


def _compose(quality: str, *blocks: str) -> str:
    text = "\n\n".join(blocks)
    return text.replace("{quality}", quality).replace("{Quality}", quality.capitalize())


# For a fine-tuned simulator: no example, question and answer in both.
SFT_WORDS = SimWords(
    system="",
    useful=_compose("useful", USEFUL, BACKGROUND, FORM, ASK),
    noisy=_compose("noisy", NOISY, BACKGROUND, FORM, ASK),
)
# For an LLM as it is: a worked example each. A model that was never taught to withhold an answer does so best when it
# is not told the answer: the noisy prompt holds neither question nor answer.
PROMPTED_WORDS = SimWords(
    system="",
    useful=_compose("useful", USEFUL, BACKGROUND, FORM, USEFUL_EXAMPLE, ASK),
    noisy=_compose("noisy", NOISY, FORM, NOISY_EXAMPLE, ASK),
)


def load_words(source: str | Path) -> SimWords:
    """`sft`, `prompted`, or a JSON file {"system", "useful", "noisy", "count", "earlier"} (the last two may be absent).

    Raises ValueError for what is not such a file; an unknown key is an error, so that no word is dropped in silence.
    """
    known = {"sft": SFT_WORDS, "prompted": PROMPTED_WORDS}
    if source in known:
        return known[source]
    try:
        words = json.loads(Path(source).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{source} is not JSON ({e})") from None
    types = {f.name: f.type for f in fields(SimWords)}
    if not isinstance(words, dict) or not {"system", "useful", "noisy"} <= words.keys() <= types.keys():
        raise ValueError(f"{source} must hold one JSON object with the keys {', '.join(types)} and no others")
    for name, value in words.items():
        if type(value) is not types[name]:
            raise ValueError(f"{source}: {name!r} must be of type {types[name].__name__}")
    return SimWords(**words)


def prompt(tok: Tokenizer, words: SimWords, query: Query, noisy: bool) -> list[int]:
    """The ids that ask for documents for `query`: the only place where the simulator's prompt is made.

    Question and answer are the query's own. Of several golden answers the *first* goes in: data sets list the canonical
    form first, and a list of aliases would teach the simulator to write lists.
    """
    message = fill(
        words.noisy if noisy else words.useful,
        query=query.text,
        question=query.question.text,
        answer=query.question.answers[0],
        earlier="".join(fill(words.earlier, query=q, documents=d) for q, d in query.earlier),
    )
    return tok.chat([{"role": "system", "content": words.system}, {"role": "user", "content": message}])


# ----------------------------------------------------------------------------------------------------- simulating


def clean(text: str, count: int) -> str:
    """Sampled text -> documents: cut before "Doc {count + 1}", blank lines collapsed, ends of lines stripped."""
    lines = text.split(f"Doc {count + 1}", 1)[0].splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def p_noise(
    step: int, steps: int, start: float, end: float, shape: str = "exponential", base: float = 4.0
) -> float:
    """The curriculum: the probability that a search at `step` of `steps` (both ends included) returns noisy documents.

    exponential   start + (base^(step/steps) - 1) / (base - 1) * (end - start)     the paper's equation 2: slow, then fast
    linear        start + step/steps * (end - start)
    constant      the exponential's mean over the run: the ablation then compares the order alone, not the amount
    reverse       the exponential, from end to start
    Raises ValueError for probabilities outside 0..1, a step outside 0..steps, an unknown shape, base <= 0 or base = 1.
    """
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"noise is a probability, within 0..1, not {start} -> {end}")
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step {step} lies outside a curriculum of {steps} steps")
    if base <= 0 or base == 1:
        raise ValueError(f"the curriculum's base must be positive and not 1, not {base} (for a line: linear)")
    if shape == "reverse":
        return p_noise(step, steps, end, start, "exponential", base)
    risen = {
        "exponential": (base ** (step / steps) - 1) / (base - 1),
        "linear": step / steps,
        "constant": 1 / math.log(base) - 1 / (base - 1),
    }
    if shape not in risen:
        raise ValueError(f"unknown curriculum {shape!r}: choose {', '.join(risen)} or reverse")
    return start + risen[shape] * (end - start)


EVERY_SIBLING = -1  # stands in a coin's address where the sibling would


def noise_coin(address: tuple[int, ...], shared: bool) -> float:
    """One uniform for the search at (seed, step, question, sibling, call); `shared`: the same for all siblings.

    Shared coins give every trajectory of a group the same luck at its n-th search, so that the group's advantages
    compare what the policy did, and not what the engine happened to return.
    """
    *before, sibling, call = address
    return coin((*before, EVERY_SIBLING if shared else sibling, call))


@dataclass(frozen=True)
class Simulator:
    """An LLM as a search engine: `yield from simulator(query)` gives Documents. One object serves a whole step.

    p_noise         probability that a search returns noisy documents; `dataclasses.replace(sim, p_noise=...)` per step
    shared          the siblings of a group share their coins, search by search
    limit           most tokens of one output
    temperature     of its sampling; the paper's value
    """

    tok: Tokenizer
    words: SimWords = SFT_WORDS
    p_noise: float = 0.0
    shared: bool = False
    limit: int = 600
    temperature: float = 0.8

    def __post_init__(self):
        if not 0 <= self.p_noise <= 1:
            raise ValueError(f"noise is a probability, within 0..1, not {self.p_noise}")

    def __call__(self, query: Query):
        noisy = noise_coin(query.address, self.shared) < self.p_noise
        asked = prompt(self.tok, self.words, query, noisy)
        stop = f"Doc {self.words.count + 1}"
        sampled = yield Turn(asked, SIMULATOR, self.limit, self.temperature, (stop,), query.address)
        text = self.tok.decode([i for i in sampled.ids if i not in self.tok.eos])
        return Documents(clean(text, self.words.count), noisy)


# ---------------------------------------------------------------------------------------------------- fine-tuning

ROW = {"query": str, "question": str, "answer": str, "documents": str, "quality": str}


def check_row(row: object) -> dict:
    """The row itself, or ValueError with what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    for key, kind in ROW.items():
        if not isinstance(row.get(key), kind):
            raise ValueError(f"has no text under {key!r}")
    if row["quality"] not in ("useful", "noisy"):
        raise ValueError(f"has the quality {row['quality']!r}: it must be useful or noisy")
    if unknown := row.keys() - ROW.keys() - {"earlier"}:
        raise ValueError(f"has unknown columns: {', '.join(sorted(unknown))}")
    return row


def read_rows(path: str | Path) -> list[dict]:
    """Rows from JSON lines {"query", "question", "answer", "documents", "quality": "useful" | "noisy"}, and optionally
    "earlier": [[query, documents], ...]. Raises ValueError with the number of a broken line; blank lines are skipped."""
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(check_row(json.loads(line)))
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def row_query(row: dict) -> Query:
    """The query of a row, with its question."""
    question = Question(row["question"], (row["answer"],))
    return Query(row["query"], question, (), tuple((q, d) for q, d in row.get("earlier", ())))


@dataclass(frozen=True)
class Example:
    """A row as ids: the prompt, then the documents and the end of the turn from `start` on."""

    ids: list[int]
    start: int


def example(tok: Tokenizer, words: SimWords, row: dict) -> Example:
    """The prompt as in sampling, then the row's documents, then the id that ends a turn."""
    asked = prompt(tok, words, row_query(row), row["quality"] == "noisy")
    return Example(asked + tok.encode(row["documents"]) + [tok.end], len(asked))


def steps_of(
    rows: list[dict], encode: Callable[[dict], Example], tokens: int, seed: int
) -> Iterator[list[Example]]:
    """An endless stream of steps: rows in a new seeded order each time round, as many as `tokens` hold when padded.

    Encoded when their turn comes, so that a large set costs nothing at the start. A row longer than `tokens` is a step
    of its own.
    """
    order, step, longest = random.Random(seed), [], 0
    while True:
        for row in order.sample(rows, len(rows)):
            new = encode(row)
            longest = max(longest, len(new.ids))
            if step and longest * (len(step) + 1) > tokens:
                yield step
                step, longest = [], len(new.ids)
            step.append(new)


def document_logp(model: Model, step: list[Example]) -> Tensor:
    """Log-probabilities (N,) of the step's document tokens alone, fp32, through the simulator's adapter."""
    device = model.head.device
    T = max(len(e.ids) for e in step)
    ids = torch.tensor([e.ids + [0] * (T - len(e.ids)) for e in step], device=device)  # (B, T)
    lengths = torch.tensor([len(e.ids) for e in step], device=device)  # (B,)
    starts = torch.tensor([e.start for e in step], device=device)  # (B,)
    at = torch.arange(T, device=device)
    mask = (at >= starts[:, None]) & (at < lengths[:, None])  # (B, T)
    h = model(ids, SIMULATOR, lengths)[:, :-1][mask[:, 1:]]  # (N, d)
    return linear_logp(h, model.head, ids[:, 1:][mask[:, 1:]])[0]


@torch.no_grad()
def held_out_loss(model: Model, examples: list[Example], tokens: int) -> float:
    """Mean negative log-probability of the document tokens of all examples, in nats."""
    rows = max(1, tokens // max(len(e.ids) for e in examples))
    parts = [document_logp(model, examples[i : i + rows]) for i in range(0, len(examples), rows)]
    return -torch.cat(parts).mean().item()


@dataclass(frozen=True)
class Progress:
    """After `step` of `steps`: losses in nats a document token, `rate` in tokens a second, `left` in seconds."""

    step: int
    steps: int
    loss: float
    held: float | None  # only where it was measured: every `every` steps, and at the end
    rate: float
    left: float

    def __str__(self):
        held = "" if self.held is None else f"   held-out {self.held:.3f}"
        return (
            f"sft {self.step:4d}/{self.steps}   loss {self.loss:.3f}{held}   "
            f"{self.rate:,.0f} tokens/s   {self.left:.0f} s left"
        )


def sft(
    model: Model,
    tok: Tokenizer,
    words: SimWords,
    rows: list[dict],
    steps: int = 1000,
    lr: float = 1e-4,
    tokens: int = 4096,
    held: int = 64,
    every: int = 50,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> Iterator[Progress]:
    """Fine-tune the simulator's adapter on rows: a generator that yields Progress after each step (iterate to run it).

    AdamW on `model.adapter(SIMULATOR)` alone, lr falling linearly to 0, about `tokens` tokens a step, loss on the
    documents and the end of the turn only. At most `held` rows, and a tenth, are held out; their loss is measured
    after the first step, every `every` steps and at the end. All order comes from `seed`: with the adapter and
    `optimizer` as they were after step `first`, the run goes on as if it had never stopped.
    """
    rows = random.Random(seed).sample(rows, len(rows))
    held = min(held, len(rows) // 10)

    def encode(row: dict) -> Example:
        return example(tok, words, row)

    exam = [encode(row) for row in rows[:held]]
    adapter = model.adapter(SIMULATOR)
    optimizer = optimizer or adamw(model)
    began, seen = time.monotonic(), 0
    for step, batch in zip(range(1, steps + 1), steps_of(rows[held:], encode, tokens, seed)):
        if step <= first:
            continue
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        loss = -document_logp(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([adapter], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(len(e.ids) for e in batch)
        measure = exam and (step in (1, steps) or step % every == 0)
        known = held_out_loss(model, exam, tokens) if measure else None
        spent = time.monotonic() - began
        yield Progress(step, steps, loss.item(), known, seen / spent, spent / (step - first) * (steps - step))


def adamw(model: Model) -> torch.optim.AdamW:
    """The optimiser of the simulator's adapter. No weight decay: B starts at 0, and 0 is the base."""
    return torch.optim.AdamW([model.adapter(SIMULATOR)], weight_decay=0.0)
