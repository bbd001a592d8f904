"""The world: the words that make an LLM a search engine, the noise curriculum, the simulator's fine-tuning.

A `Simulator` is a *search* (see rollout.py): called with a query it yields one turn in the role SIMULATOR and
returns that turn's text as documents, useful or noisy by a keyed coin. Its prompt is made by `prompt` and by
nothing else, so that sampling and fine-tuning cannot drift apart.

What this is not: a server, a client, a cache, or a judge of what was written. The engine of rollout.py
samples these turns in the same batch as the policy's; who wants other documents brings another search.

    python simulator.py write --sim 3b --query "capital of Peru" --question "Where is Lima?" --answer Peru
    python simulator.py sft --sim 3b --rows rows.jsonl --out runs/simulator
    python simulator.py write --sim 3b --adapter runs/simulator --query ... --question ... --answer ...

Source: ZeroSearch, arXiv 2505.04588 (simulator, curriculum). The words are our own.
"""

import argparse
import json
import math
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch

import model as models
from model import SIMULATOR, Model
from rollout import DOCUMENTS, Documents, Engine, Query, Question, Turn, coin, fill
from search import read_lines
from sft import Example, Progress, adamw, fine_tune
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------ words

TASK = """\
You are a search engine, and the query at the end has just reached you. Write five {quality} documents for \
it, the ones that you would return: """
USEFUL = TASK + "they are about what the query asks, and whoever reads them can answer it."
NOISY = TASK + "they look related to the query, but whoever reads them still cannot answer it."
BACKGROUND = """\
What the user is after (for your eyes only):
Question: {question}
Correct answer: {answer}"""
FORM = """\
A document is a passage of about 30 words, in the manner of an encyclopedia or a web page. Put each on a \
line of its own, numbered "Doc 1: ..." to "Doc 5: ...", and write nothing else. All five documents must be \
{quality}."""
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
Doc 1: The Ljubljanica flows through the middle of Ljubljana, the capital of Slovenia, and is crossed there \
by the Triple Bridge and the Dragon Bridge before it joins the Sava east of the city.
Doc 2: Ljubljana lies between the Alps and the Adriatic. Its old town grew up between Castle Hill and the \
river Ljubljanica, whose embankments were laid out anew in the 1930s.
Doc 3: The Ljubljanica is called the river of seven names: south-west of Ljubljana it disappears into the \
karst again and again, and comes back to the surface each time under another name.
Doc 4: Boats on the Ljubljanica leave from the centre of Ljubljana, pass the covered market and the \
Cobblers' Bridge, and take about an hour for the round trip.
Doc 5: Divers have raised thousands of objects from the bed of the Ljubljanica upstream of Ljubljana, among \
them Roman swords, Bronze Age helmets and medieval tools.

Now it is your turn."""
NOISY_EXAMPLE = """\
Here is an example.
Query: river in Ljubljana
Noisy Output:
Doc 1: Ljubljana became the capital of independent Slovenia in 1991. It has about 300,000 inhabitants, a \
university founded in 1919, and a castle on a wooded hill above the old town.
Doc 2: The Danube passes through four capitals, Vienna, Bratislava, Budapest and Belgrade, on its way from \
the Black Forest to the Black Sea, more than any other river.
Doc 3: Legend has it that Ljubljana was founded by Jason, who killed a dragon in a marsh nearby. The dragon \
has stood in the city's coat of arms ever since.
Doc 4: Slovenia is a land of forests and caves. Postojna Cave, 24 kilometres long, has been shown to \
visitors since 1819 and is toured on an electric train.
Doc 5: The Ljubljana Marathon is run each October. Its course starts and ends in the city centre and draws \
runners from dozens of countries.

Now it is your turn."""


@dataclass(frozen=True)
class SimWords:
    """What the simulator is told: a system message and two whole user messages, one for each quality.

    `useful` and `noisy` are templates over {query}, {question}, {answer} and {earlier}; {query} is required,
    other braces are literal. Where the tokenizer has no chat template, the texts themselves are the prompt.
    `count` is the number of documents that they ask for. {earlier} becomes one copy of the template of that
    name, over {query} and {documents}, for each earlier search of the episode, oldest first.
    Raises ValueError for words that cannot work.
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


# For a fine-tuned simulator: question and answer in both, no example.
SFT_WORDS = SimWords(
    system="",
    useful=_compose("useful", USEFUL, BACKGROUND, FORM, ASK),
    noisy=_compose("noisy", NOISY, BACKGROUND, FORM, ASK),
)
# For an LLM as it is: a worked example each. A model that was never taught to withhold an answer does so best
# when it does not know the answer, so the noisy prompt holds neither question nor answer.
PROMPTED_WORDS = SimWords(
    system="",
    useful=_compose("useful", USEFUL, BACKGROUND, FORM, USEFUL_EXAMPLE, ASK),
    noisy=_compose("noisy", NOISY, FORM, NOISY_EXAMPLE, ASK),
)
NAMED_WORDS = {"sft": SFT_WORDS, "prompted": PROMPTED_WORDS}


def load_words(source: str | Path) -> SimWords:
    """`sft`, `prompted`, or a JSON file {"system", "useful", "noisy"} with optional "count" and "earlier".

    Raises ValueError for what is not such a file. An unknown key is an error: no word is lost in silence.
    """
    if source in NAMED_WORDS:
        return NAMED_WORDS[source]
    words = models.read_json(Path(source), "a place of simulator prompts")
    types = {f.name: f.type for f in fields(SimWords)}
    if not {"system", "useful", "noisy"} <= words.keys() <= types.keys():
        raise ValueError(
            f"{source} must hold system, useful, noisy (and may hold count, earlier): no other keys"
        )
    for name, value in words.items():
        if type(value) is not types[name]:
            raise ValueError(f"{source}: {name} must be of type {types[name].__name__}")
    return SimWords(**words)


def save_words(words: SimWords, path: str | Path) -> None:
    """Write what `load_words` reads: an adapter travels with the words that it was trained on."""
    Path(path).write_text(json.dumps(asdict(words), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prompt(tok: Tokenizer, words: SimWords, query: Query, noisy: bool) -> list[int]:
    """The ids that ask for documents for `query`: the only place where the simulator's prompt is made.

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
    return tok.chat([{"role": "system", "content": words.system}, {"role": "user", "content": message}])


# ------------------------------------------------------------------------------------------------- simulating


def clean(text: str, count: int) -> str:
    """Sampled text -> documents: cut before "Doc {count + 1}", no blank lines, no blanks around a line."""
    lines = text.split(f"Doc {count + 1}", 1)[0].splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def p_noise(
    step: int, steps: int, start: float, end: float, shape: str = "exponential", base: float = 4.0
) -> float:
    """The curriculum: the probability that a search at `step` of `steps` (both 0 and steps count).

    exponential   start + (base^(step/steps) - 1) / (base - 1) * (end - start), the paper's
    linear        start + step/steps * (end - start)
    constant      the exponential's mean over the run: an ablation of the order, with the amount unchanged
    reverse       the exponential, from end to start
    Raises ValueError for noise outside 0..1, a step outside the run, an unknown shape or an unfit base.
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
    """One uniform for the search at (seed, step, question, sibling, call); `shared`: one for all siblings.

    Shared coins give every trajectory of a group the same luck at its n-th search, so that advantages compare
    what the policy did, and not what the engine happened to return.
    """
    *group, _, call = address
    return coin((*group, call) if shared else address)


@dataclass(frozen=True)
class Simulator:
    """An LLM as a search engine: `yield from simulator(query)` gives Documents.

    p_noise       probability of noisy documents; `dataclasses.replace(sim, p_noise=...)` at each step
    shared        the siblings of a group share their coins, search by search
    limit         most tokens of one output
    temperature   of its sampling; like the limit, the paper's
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
        stops, address = (f"Doc {self.words.count + 1}",), (*query.address, DOCUMENTS)
        sampled = yield Turn(asked, SIMULATOR, self.limit, self.temperature, stops, address)
        text = self.tok.decode([i for i in sampled.ids if i not in self.tok.eos])
        return Documents(clean(text, self.words.count), noisy)


# ------------------------------------------------------------------------------------------------ fine-tuning

COLUMNS = ("query", "question", "answer", "documents", "quality")


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


def read_rows(path: str | Path) -> list[dict]:
    """Rows from JSON lines {"query", "question", "answer", "documents", "quality": "useful" | "noisy"}.

    A row may also hold "earlier": [[query, documents], ...], the searches before it. Blank lines are skipped.
    Raises ValueError with the number of a broken line.
    """
    rows = list(read_lines(path, check_row))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def row_query(row: dict) -> Query:
    """A row's query, with its question."""
    earlier = tuple((query, documents) for query, documents in row.get("earlier", ()))
    return Query(row["query"], Question(row["question"], (row["answer"],)), (), earlier)


def end_of_turn(tok: Tokenizer) -> int:
    """The id that ends an assistant's turn in the chat template; without one, the lowest that ends a text."""
    turns = tok.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return ([i for i in turns if i in tok.eos] or [min(tok.eos)])[-1]


def example(tok: Tokenizer, words: SimWords, end: int, row: dict) -> Example:
    """A row's prompt, made as in sampling, then its documents, then the id `end` that ends a turn."""
    asked = prompt(tok, words, row_query(row), row["quality"] == "noisy")
    return Example(asked + tok.encode(row["documents"]) + [end], len(asked))


def sft(
    model: Model, tok: Tokenizer, words: SimWords, rows: list[dict], steps: int, lr: float, **options
) -> Iterator[Progress]:
    """Fine-tune the simulator's adapter on rows (`read_rows`); options are those of `sft.fine_tune`."""
    return fine_tune(
        model, SIMULATOR, rows, partial(example, tok, words, end_of_turn(tok)), steps, lr, **options
    )


# ----------------------------------------------------------------------------------------------- command line

WORDS_FILE, STATE_FILE = "sim_prompt.json", "state.pt"


def words_for(adapter: str | None, named: str | None) -> SimWords:
    """The words that were named; else the ones that the adapter was trained on; else the prompted form."""
    if named:
        return load_words(named)
    return load_words(Path(adapter) / WORDS_FILE) if adapter else PROMPTED_WORDS


def load_body(args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """The body and its tokenizer, where and as the flags say."""
    where = models.resolve(args.sim)
    device, dtype = models.machine(args.device, args.dtype)
    return models.load(where, models.DTYPES[dtype], device), Tokenizer.load(where)


def save_run(out: Path, model: Model, words: SimWords, state: dict, base: str) -> None:
    """Write the adapter, its words, and what it takes to go on: the state is whole whenever a run is cut."""
    models.save_adapter(model, SIMULATOR, out, base)
    save_words(words, out / WORDS_FILE)
    torch.save(state, out / "state.tmp")
    (out / "state.tmp").replace(out / STATE_FILE)


def load_state(out: Path, flags: dict, resume: bool) -> dict | None:
    """The state to go on from, None for a new run. Raises ValueError where `out` does not fit the flags."""
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: choose another --out, or --resume the run in it")
        return None
    if not (out / STATE_FILE).exists():
        raise ValueError(f"{out} holds no unfinished run to resume")
    state = torch.load(out / STATE_FILE, weights_only=True)
    changed = sorted(k for k in flags if flags[k] != state["flags"].get(k))
    if changed:
        raise ValueError(
            f"{out} was begun with another --{changed[0].replace('_', '-')}: resume with the same"
        )
    return state


def command_sft(args: argparse.Namespace) -> None:
    """Fine-tune, show progress, save every --every steps and at the end."""
    out, rows, words = Path(args.out), read_rows(args.rows), load_words(args.sim_prompt or "sft")
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "resume", "out", "device")}
    state = load_state(out, flags, args.resume)
    body, tok = load_body(args)
    body.add_role(SIMULATOR, args.rank, args.alpha, args.seed)
    optimizer = adamw(body, SIMULATOR)
    if state:
        body.adapter(SIMULATOR).data.copy_(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    print(f"{len(rows)} rows, {body.adapter(SIMULATOR).numel():,} parameters to train, {body.device}")
    run = sft(
        body, tok, words, rows, args.steps, args.lr, tokens=args.tokens, held=args.held, every=args.every,
        seed=args.seed, micro=args.micro, optimizer=optimizer, done=state["step"] if state else 0,
    )  # fmt: skip
    for p in run:
        if p.step % 10 == 0 or p.held is not None:
            print(p, flush=True)
        if p.step % args.every == 0 or p.step == args.steps:
            adapter = body.adapter(SIMULATOR).detach()
            now = {"step": p.step, "adapter": adapter, "optimizer": optimizer.state_dict(), "flags": flags}
            save_run(out, body, words, now, args.sim)
    (out / STATE_FILE).unlink()
    print(f"saved to {out}")


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns of a terminal of `width` characters."""
    half = (width - 3) // 2
    columns = [[w for line in text.splitlines() for w in textwrap.wrap(line, half)] for text in (left, right)]
    return "\n".join(f"{a:{half}} | {b}" for a, b in zip_longest(*columns, fillvalue=""))


def command_write(args: argparse.Namespace) -> None:
    """Print what the simulator writes for one query: useful on the left, noisy on the right."""
    words = words_for(args.adapter, args.sim_prompt)
    body, tok = load_body(args)
    if args.adapter:
        models.load_adapter(body, SIMULATOR, args.adapter)
    query = Query(args.query, Question(args.question, (args.answer,)), (args.seed, 0, 0, 0, 0))
    useful = Simulator(tok, words, 0.0, limit=args.limit, temperature=args.temperature)
    noisy = replace(useful, p_noise=1.0)
    longest = max(len(prompt(tok, words, query, n)) for n in (False, True))
    capacity = min(longest + args.limit + 1, len(body.cos))
    engine = Engine({SIMULATOR: (body, tok)}, seats=2, capacity=capacity)
    left, right = engine.run([useful(query), noisy(query)])
    width = shutil.get_terminal_size().columns
    print(side_by_side(f"USEFUL\n{left.text}", f"NOISY\n{right.text}", width))


def positive(text: str) -> int:
    """A whole number from 1 on; argparse turns the ValueError into its own line and exit code 2."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: list[str] | None = None) -> None:
    p = models.OneLine(description=__doc__.split("\n")[0])
    verbs = p.add_subparsers(required=True, metavar="sft | write")
    a = verbs.add_parser("sft", help="fine-tune an adapter that writes useful or noisy documents, as asked")
    a.add_argument("--rows", required=True, help="JSON lines: query, question, answer, documents, quality")
    a.add_argument("--out", required=True, help="directory for the adapter (PEFT format) and its words")
    a.add_argument("--steps", type=positive, default=1000, help="as in the paper")
    a.add_argument("--lr", type=float, default=1e-4, help="at the start; falls linearly to 0")
    a.add_argument("--tokens", type=positive, default=4096, help="a step")
    a.add_argument(
        "--micro", type=positive, default=1024, help="tokens a pass, padding included: sets the memory"
    )
    a.add_argument("--rank", type=positive, default=16, help="of the LoRA matrices")
    a.add_argument("--alpha", type=float, default=32.0, help="LoRA scale times rank")
    a.add_argument("--held", type=int, default=64, help="rows held out (at most a tenth)")
    a.add_argument(
        "--every", type=positive, default=50, help="steps between held-out losses, and between saves"
    )
    a.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    a.set_defaults(run=command_sft)
    w = verbs.add_parser(
        "write", help="what the simulator writes for one query, useful and noisy side by side"
    )
    w.add_argument("--adapter", help="directory of a fine-tuned simulator; without it the body as it is")
    w.add_argument("--query", required=True, help="what the policy would search for")
    w.add_argument("--question", required=True, help="what it wants to answer")
    w.add_argument("--answer", required=True, help="the golden answer")
    w.add_argument("--limit", type=positive, default=600, help="most tokens of an output")
    w.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    w.set_defaults(run=command_write)
    for verb in (a, w):
        verb.add_argument(
            "--sim", required=True, help=f"{' '.join(models.PRESETS)}, a directory, or a hub id"
        )
        verb.add_argument("--sim-prompt", help="sft, prompted, or a JSON file: system, useful, noisy, count")
        verb.add_argument("--seed", type=int, default=0, help="of the adapter, the order, the sampling")
        verb.add_argument("--dtype", choices=models.DTYPES, help="of the body (bf16 on a GPU, else fp32)")
        verb.add_argument("--device", help="cuda where there is one, else cpu")
    args = p.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    models.command_line(main)
