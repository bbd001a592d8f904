"""The world: an LLM as a search engine, its noise curriculum, its fine-tuning, and how good it is.

A `Simulator` is a *search* (see rollout.py): called with a query it yields one turn in the role SIMULATOR and
returns that turn's text as documents, useful or noisy by a keyed coin. Its words are in prompts.py, the rows
that it learns from in collect.py.

What this is not: a server, a client, a cache, or a judge of what was written. The engine of rollout.py
samples these turns in the same batch as the policy's; who wants other documents brings another search.

    python simulator.py collect --policy 3b --data nq,hotpotqa --search bm25:corpus.jsonl.gz --rows 10000 \\
        --judge judge --out rows.jsonl
    python simulator.py sft --sim 3b --rows rows.jsonl --out runs/simulator
    python simulator.py audit --sim 3b --adapter runs/simulator --rows held_out.jsonl
    python simulator.py write --sim 3b --adapter runs/simulator --query ... --question ... --answer ...

Source: ZeroSearch, arXiv 2505.04588 (simulator, curriculum).
"""

import argparse
import math
import random
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

import collect as collecting
import model as models
import toy
from collect import Collector, audit_figures, read_rows, row_query
from model import POLICY, REFERENCE, SIMULATOR, Model
from prompts import (
    PROMPTED_WORDS,
    SFT_WORDS,
    SimWords,
    load_policy_words,
    load_words,
    messages,
    prompt,
    save_words,
)
from questions import load_questions
from rollout import DOCUMENTS, WORDS, Documents, Engine, Limits, Query, Question, Turn, coin, uniforms
from search import open_search
from servers import Chat, is_address
from sft import Example, Progress, adamw, fine_tune, held_out_loss
from tokenizer import Tokenizer

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
    server        where given, the LLM runs there, and is asked instead of a body of our own; `tok` is unused
    """

    tok: Tokenizer | None
    words: SimWords = SFT_WORDS
    p_noise: float = 0.0
    shared: bool = False
    limit: int = 600
    temperature: float = 0.8
    server: Chat | None = None

    def __post_init__(self):
        if not 0 <= self.p_noise <= 1:
            raise ValueError(f"noise is a probability, within 0..1, not {self.p_noise}")

    def __call__(self, query: Query):
        noisy = noise_coin(query.address, self.shared) < self.p_noise
        stops, address = (f"Doc {self.words.count + 1}",), (*query.address, DOCUMENTS)
        if self.server:
            asked, seed = messages(self.words, query, noisy), int(uniforms(address, 1)[0] * 2**31)
            text = yield self.server.complete(asked, self.temperature, self.limit, seed, stops)
        else:
            asked = prompt(self.tok, self.words, query, noisy)
            sampled = yield Turn(asked, SIMULATOR, self.limit, self.temperature, stops, address)
            text = self.tok.decode([i for i in sampled.ids if i not in self.tok.eos])
        return Documents(clean(text, self.words.count), noisy)


# ------------------------------------------------------------------------------------------------ fine-tuning


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


# -------------------------------------------------------------------------------------------------- the audit


def written(
    body: Model | None, simulator: Simulator, queries: list[Query], seats: int = 16, label: str = "audit"
) -> list[tuple[Query, Documents]]:
    """What the simulator writes for each query, once asked for useful documents and once for noisy ones.

    body: with its adapter; None where a server writes.
    """
    bodies, capacity = {}, 1
    if body:
        asked = (prompt(simulator.tok, simulator.words, q, noisy) for q in queries for noisy in (False, True))
        capacity = min(max(map(len, asked)) + simulator.limit + 1, len(body.cos))
        bodies = {SIMULATOR: (body, simulator.tok)}
    both = [(query, replace(simulator, p_noise=p)) for query in queries for p in (0.0, 1.0)]
    with tqdm(total=len(both), desc=label, unit=" outputs", leave=False, disable=None) as bar:
        outputs = Engine(bodies, seats, capacity).run(
            (search(query) for query, search in both), lambda done, of, stats: bar.update(done - bar.n)
        )
    return [(query, documents) for (query, _), documents in zip(both, outputs)]


def addressed(queries: list[Query], seed: int) -> list[Query]:
    """The queries, each with randomness of its own."""
    return [replace(query, address=(seed, 0, i, 0, 0)) for i, query in enumerate(queries)]


def audit(
    body: Model | None, simulator: Simulator, queries: list[Query], seats: int = 16, label: str = "audit"
) -> dict[str, dict[str, float]]:
    """`audit_figures` of what is written for held-out queries, for each once useful and once noisy."""
    return audit_figures(written(body, simulator, queries, seats, label), simulator.words.count)


def audit_table(audits: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of several audits, {name: `audit_figures`}: a line for each and each quality."""
    columns = ("n", "answer", "repeats", "distinct", "words", "formed")
    lines = [" " * 20 + "".join(f"{c:>10}" for c in columns)]
    for name, figures in audits.items():
        for quality, f in figures.items():
            cells = (f"{f[c]:10.3f}" if c in f and c != "n" else f"{f.get(c, '-'):>10}" for c in columns)
            lines.append(f"{name + ' ' + quality:20}" + "".join(cells))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- command line

WORDS_FILE, STATE_FILE, RESULT_FILE = "sim_prompt.json", "state.pt", "sft.json"


def words_for(adapter: str | None, named: str | None, usual: SimWords = PROMPTED_WORDS) -> SimWords:
    """The words that were named; else the ones that the adapter was trained on; else the usual ones."""
    if named:
        return load_words(named)
    return load_words(Path(adapter) / WORDS_FILE) if adapter else usual


def load_body(args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """The body and its tokenizer, where and as the flags say."""
    where = models.resolve(args.policy if args.run is command_collect else args.sim)
    device, dtype = models.machine(args.device, args.dtype)
    return models.load(where, models.DTYPES[dtype], device), Tokenizer.load(where)


def split_by_question(rows: list[dict], held: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(rows held out, rows to train on): at most `held`, and at most a tenth; no question is in both."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["question"], []).append(row)
    order = random.Random(seed).sample(list(groups), len(groups))
    most, out = min(held, len(rows) // 10), []
    for question in order:
        if len(out) + len(groups[question]) <= most:
            out += groups.pop(question)
    return out, [row for row in rows if row["question"] in groups]


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


def usual_words(args: argparse.Namespace, usual: SimWords) -> SimWords:
    """The toy world's words for its body, else `usual`."""
    return toy.SIM_WORDS if args.sim == "tiny" else usual


def sampler(args: argparse.Namespace, tok: Tokenizer, words: SimWords) -> Simulator:
    """The simulator as it is audited: with the temperature and the length of the flags."""
    limit = args.sim_tokens or (40 if args.sim == "tiny" else 600)
    return Simulator(tok, words, limit=limit, temperature=args.temperature)


def command_sft(args: argparse.Namespace) -> None:
    """Fine-tune, show progress, save every --every steps; held-out figures before and after."""
    out, columns = Path(args.out), column_names(args.columns)
    rows = read_rows(args.rows, columns)
    words = load_words(args.sim_prompt) if args.sim_prompt else usual_words(args, SFT_WORDS)
    if args.held_rows:
        exam = read_rows(args.held_rows, columns)[: args.held]
    else:
        exam, rows = split_by_question(rows, args.held, args.seed)
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "resume", "out", "device", "seats")}
    state = load_state(out, flags, args.resume)
    body, tok = load_body(args)
    body.add_role(SIMULATOR, args.rank, args.alpha, args.seed)
    optimizer = adamw(body, SIMULATOR)
    size = body.adapter(SIMULATOR).numel()
    print(f"{len(rows)} rows, {len(exam)} held out, {size:,} parameters to train, {body.device}")
    look = partial(held_out_figures, args, body, sampler(args, tok, words), exam)
    if state:
        body.adapter(SIMULATOR).data.copy_(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    before = state["before"] if state else look("before")
    run = sft(
        body, tok, words, rows, args.steps, args.lr, tokens=args.tokens, exam=exam, every=args.every,
        seed=args.seed, micro=args.micro, optimizer=optimizer, done=state["step"] if state else 0,
    )  # fmt: skip
    for p in run:
        if p.step % 10 == 0 or p.held is not None:
            print(p, flush=True)
        if p.step % args.every == 0 or p.step == args.steps:
            adapter = body.adapter(SIMULATOR).detach()
            now = {"step": p.step, "adapter": adapter, "optimizer": optimizer.state_dict(), "flags": flags}
            save_run(out, body, words, now | {"before": before}, args.sim)
    result = {"before": before, "after": look("after"), "rows": len(rows), "held": len(exam), "flags": flags}
    models.write_json(out / RESULT_FILE, result)
    print(report(before, result["after"]))
    (out / STATE_FILE).unlink()
    print(f"saved to {out}")


def held_out_figures(
    args: argparse.Namespace, body: Model, simulator: Simulator, exam: list[dict], label: str
) -> dict:
    """{"loss": nats a token of the held-out documents, "audit": what is written for their queries}."""
    if not exam:
        return {}
    encode = partial(example, simulator.tok, simulator.words, end_of_turn(simulator.tok))
    loss = held_out_loss(body, SIMULATOR, [encode(row) for row in exam], args.micro)
    queries = addressed([row_query(row) for row in exam[: args.audit]], args.seed)
    audited = audit(body, simulator, queries, args.seats, f"audit {label}") if queries else {}
    return {"loss": loss, "audit": audited}


def report(before: dict, after: dict) -> str:
    """Held-out loss and audit, before and after."""
    if not before:
        return (
            "nothing was held out: no loss, no audit (too few rows, or one question alone: --held-rows FILE)"
        )
    loss = f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f} nats a token"
    audits = {"before": before["audit"], "after": after["audit"]}
    return f"{loss}\n{audit_table(audits)}" if before["audit"] else loss


def column_names(text: str | None) -> dict[str, str]:
    """ "prompt=instruction,documents=output" -> {"prompt": "instruction", "documents": "output"}."""
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    if not all(ours and sign and theirs for ours, sign, theirs in pairs):
        raise ValueError(f"--columns is OURS=THEIRS, comma-separated, not {text!r}")
    return {ours: theirs for ours, _, theirs in pairs}


def load_simulator(args: argparse.Namespace) -> tuple[Model | None, Simulator]:
    """The simulator that the flags name, and its body with its adapter: None where --sim is a server."""
    words = words_for(args.adapter, args.sim_prompt, usual_words(args, PROMPTED_WORDS))
    if is_address(args.sim):
        return None, replace(sampler(args, None, words), server=Chat(args.sim))
    body, tok = load_body(args)
    if args.adapter:
        models.load_adapter(body, SIMULATOR, args.adapter)
    return body, sampler(args, tok, words)


def command_audit(args: argparse.Namespace) -> None:
    """Print, and with --json save, what a simulator is worth on held-out queries."""
    if (args.rows is None) == (args.data is None):
        raise ValueError("audit needs --rows, or --data: rows or questions that it was not trained on")
    if args.rows:
        queries = [row_query(row) for row in read_rows(args.rows, column_names(args.columns))]
    else:
        queries = [Query(q.text, q) for q in load_questions(args.data, args.limit)]
    figures = audit(*load_simulator(args), addressed(queries[: args.limit], args.seed), args.seats)
    print(audit_table({"asked for": figures}))
    if args.json:
        flags = {k: v for k, v in vars(args).items() if k != "run"}
        models.write_json(Path(args.json), {"audit": figures, "flags": flags})


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns of a terminal of `width` characters."""
    half = (width - 3) // 2
    columns = [[w for line in text.splitlines() for w in textwrap.wrap(line, half)] for text in (left, right)]
    return "\n".join(f"{a:{half}} | {b}" for a, b in zip_longest(*columns, fillvalue=""))


def command_write(args: argparse.Namespace) -> None:
    """Print what the simulator writes for one query: useful on the left, noisy on the right."""
    query = Query(args.query, Question(args.question, (args.answer,)), (args.seed, 0, 0, 0, 0))
    (_, useful), (_, noisy) = written(*load_simulator(args), [query], seats=2)
    width = shutil.get_terminal_size().columns
    print(side_by_side(f"USEFUL\n{useful.text}", f"NOISY\n{noisy.text}", width))


def positive(text: str) -> int:
    """A whole number from 1 on; argparse turns the ValueError into its own line and exit code 2."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def limits_for(args: argparse.Namespace, usual: Limits) -> Limits:
    """The usual limits with those of the flags; a prompt may take half of an episode."""
    given = {"turns": args.turns, "turn": args.turn_tokens, "observation": args.observation_tokens}
    given |= {"episode": args.episode_tokens}
    limits = replace(usual, **{k: v for k, v in given.items() if v is not None})
    return replace(limits, prompt=min(limits.prompt, limits.episode // 2))


def load_collection(args: argparse.Namespace) -> tuple[list[Question], Collector]:
    """The questions that --data names, and all of the collector but its tokenizer."""
    for name, least in (("rows", 2), ("turns", 0), ("temperature", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.noise is not None and not 0 <= args.noise <= 1:
        raise ValueError(f"--noise is a share, within 0..1, not {args.noise}")
    words = load_policy_words(args.policy_prompt) if args.policy_prompt else None
    if args.data == "toy":
        if args.search != "toy":
            raise ValueError(f"--data toy is answered by --search toy, not {args.search}")
        share = 0.5 if args.noise is None else args.noise  # what never fails would collect no noisy rows
        questions = toy.fresh_questions(args.limit or 20_000, args.seed)
        collector = Collector(
            None, partial(toy.lookup_anywhere, noise=share), limits_for(args, toy.LIMITS),
            words or toy.WORDS, collecting.TOY_JUDGE, shown=toy.shuffled,
        )  # fmt: skip
        return questions, collector
    if args.noise is not None:
        raise ValueError(f"--noise is for --search toy: {args.search} returns what it finds")
    questions = [q for name in args.data.split(",") for q in load_questions(name, args.limit, train=True)]
    search = open_search(args.search, args.documents)
    if args.document_words:
        search = collecting.shortened(search, args.document_words)
    return questions, Collector(None, search, limits_for(args, Limits()), words or WORDS)


def command_collect(args: argparse.Namespace) -> None:
    """Let a policy search with a real engine, label what it found, write a balanced set of rows."""
    out = Path(args.out)
    if out.exists() and not args.resume:
        raise ValueError(f"--out {out} is there already: choose another, or add --resume to go on with it")
    free = ("run", "out", "resume", "rows", "judge", "samples", "seats", "device", "dtype")
    settings = {k: v for k, v in vars(args).items() if k not in free}
    questions, collector = load_collection(args)
    questions = random.Random(args.seed).sample(questions, len(questions))
    body, tok = load_body(args)
    if args.adapter:
        models.load_adapter(body, POLICY, args.adapter)
    log = collecting.Log(out.with_name(out.name + ".episodes"), settings, args.resume)
    seats = args.seats or (128 if args.data == "toy" else 16)
    room = min(collector.limits.episode + 1, len(body.cos))
    collector = replace(collector, tok=tok, temperature=args.temperature, force=args.force_search, room=room)
    engine = Engine({POLICY: (body, tok), REFERENCE: (body, tok)}, seats, room)
    ask_on = f"the episodes so far are in {log.path}: the same command with --resume goes on"
    try:
        found = collecting.collect(
            engine,
            collector,
            questions,
            log,
            args.judge,
            args.rows,
            args.samples,
            args.seed,
            rounds=4 * seats,
        )
    except OSError as e:  # an engine that fails
        raise OSError(f"{e}; {ask_on}") from None
    except KeyboardInterrupt:
        print(f"\n{ask_on}", file=sys.stderr)
        raise
    print(tally(log, found, args))
    check_found(log, found, args)
    collecting.write_rows(found.rows(args.rows), out)
    print(f"{found.balanced(args.rows)} rows in {out}; every episode in {log.path}")


def tally(log: collecting.Log, found: collecting.Sorted, args: argparse.Namespace) -> str:
    """What was collected, what the labels say of it, and what is left aside."""
    episodes, raw = log.episodes.values(), collecting.all_rows(log.episodes)
    used, forced = found.balanced(args.rows), sum(e["forced"] for e in episodes)
    surplus = len(found.useful) + len(found.noisy) - used
    aside = "".join(f", {n} {why}" for why, n in sorted(found.aside.items()))
    lines = [
        f"{len(log.episodes):,} episodes made {len(raw):,} searches ({forced:,} of them forced)",
        collecting.agreement(raw),
        f"quality by {args.judge}: {len(found.useful):,} useful, {len(found.noisy):,} noisy; "
        f"{used:,} used, left aside: {surplus:,} to balance{aside}",
    ]
    return "\n".join(lines)


def check_found(log: collecting.Log, found: collecting.Sorted, args: argparse.Namespace) -> None:
    """Raise ValueError, with advice, where there is nothing to write; say so where there is too little."""
    if not collecting.all_rows(log.episodes):
        raise ValueError(
            f"{args.policy} made no search in {len(log.episodes)} episodes: --force-search searches for the "
            "question itself; else take a larger policy, or one with an --adapter"
        )
    if not found.balanced(args.rows):
        lacking = "useful" if not found.useful else "noisy"
        raise ValueError(
            f"no row is {lacking} by --judge {args.judge}: try another --judge with --resume, "
            "more questions, or more --samples"
        )
    if found.balanced(args.rows) < args.rows // 2 * 2:
        print(f"fewer than {args.rows} rows: --resume with more --samples goes on")


def add_collect(verbs) -> argparse.ArgumentParser:
    c = verbs.add_parser(
        "collect", help="rows for sft: a policy's searches, a real engine's documents, labels"
    )
    # what is asked
    c.add_argument("--policy", required=True, help="preset, directory or hub id of the body that searches")
    c.add_argument("--adapter", help="PEFT directory of the policy's adapter; absent: the body as it is")
    c.add_argument(
        "--data", required=True, help="question files or sets, comma-separated; toy: the toy world's"
    )
    c.add_argument("--limit", type=positive, help="questions a file, drawn (all; toy: 20000)")
    c.add_argument(
        "--search", required=True, help="the real engine, as in eval.py: bm25:CORPUS, http://..., toy"
    )
    c.add_argument("--documents", type=positive, default=5, help="a search")
    c.add_argument("--document-words", type=positive, help="a document, cut after so many (whole)")
    c.add_argument("--noise", type=float, help="toy: share of searches that find nothing (.5)")
    # what is kept
    c.add_argument("--rows", type=positive, required=True, help="half of them useful, half noisy")
    c.add_argument(
        "--judge",
        choices=collecting.LABELS,
        default="judge",
        help="the label that becomes the quality (judge)",
    )
    c.add_argument(
        "--out", required=True, help="file of rows (JSON lines); beside it the log of all episodes"
    )
    c.add_argument("--resume", action="store_true", help="go on; more rows, or another --judge, are welcome")
    # the episode
    c.add_argument(
        "--policy-prompt", help="JSON file with other words for the policy: prompt, notice, system"
    )
    c.add_argument("--samples", type=positive, default=1, help="episodes a question, at most")
    c.add_argument("--temperature", type=float, default=1.0, help="of the policy")
    c.add_argument(
        "--force-search", action="store_true", help="search for the question where an episode did not"
    )
    c.add_argument("--turns", type=int, help="searches before the last answer (5; toy: 4)")
    c.add_argument("--turn-tokens", type=positive, help="a turn (500; toy: 20)")
    c.add_argument(
        "--observation-tokens", type=positive, help="of documents that the policy reads (500; toy: 32)"
    )
    c.add_argument("--episode-tokens", type=positive, help="all together (4096; toy: 192)")
    c.add_argument("--seats", type=positive, help="episodes at a time (16; toy: 128)")
    c.set_defaults(run=command_collect)
    return c


def add_sft(verbs) -> argparse.ArgumentParser:
    a = verbs.add_parser("sft", help="fine-tune an adapter that writes useful or noisy documents, as asked")
    a.add_argument(
        "--rows", required=True, help="JSON lines of `collect`, or a released set: file or hub name"
    )
    a.add_argument(
        "--out", required=True, help="directory for the adapter (PEFT format), its words, sft.json"
    )
    a.add_argument("--steps", type=positive, default=1000, help="as in the paper")
    a.add_argument("--lr", type=float, default=1e-4, help="at the start; falls linearly to 0")
    a.add_argument("--tokens", type=positive, default=4096, help="a step")
    a.add_argument(
        "--micro", type=positive, default=1024, help="tokens a pass, padding included: sets the memory"
    )
    a.add_argument("--rank", type=positive, default=16, help="of the LoRA matrices")
    a.add_argument("--alpha", type=float, default=32.0, help="LoRA scale times rank")
    a.add_argument("--held", type=int, default=64, help="rows held out (at most a tenth), by whole questions")
    a.add_argument("--held-rows", help="another file of rows to hold out, instead of a part of --rows")
    a.add_argument("--audit", type=int, default=32, help="held-out rows that are audited before and after")
    a.add_argument(
        "--every", type=positive, default=50, help="steps between held-out losses, and between saves"
    )
    a.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    a.set_defaults(run=command_sft)
    return a


def add_audit(verbs) -> argparse.ArgumentParser:
    u = verbs.add_parser("audit", help="how good is a simulator, on the queries of held-out rows?")
    u.add_argument("--adapter", help="directory of a fine-tuned simulator; without it the body as it is")
    u.add_argument("--rows", help="rows that it was not trained on, as for sft")
    u.add_argument("--data", help="instead of rows: a question file or set; each question is its own query")
    u.add_argument("--limit", type=positive, help="of them, from the top (all)")
    u.add_argument("--json", help="file for the figures and the flags")
    u.set_defaults(run=command_audit)
    return u


def add_write(verbs) -> argparse.ArgumentParser:
    w = verbs.add_parser(
        "write", help="what the simulator writes for one query, useful and noisy side by side"
    )
    w.add_argument("--adapter", help="directory of a fine-tuned simulator; without it the body as it is")
    w.add_argument("--query", required=True, help="what the policy would search for")
    w.add_argument("--question", required=True, help="what it wants to answer")
    w.add_argument("--answer", required=True, help="the golden answer")
    w.set_defaults(run=command_write)
    return w


def main(argv: list[str] | None = None) -> None:
    p = models.OneLine(description=__doc__.split("\n")[0])
    verbs = p.add_subparsers(required=True, metavar="collect | sft | audit | write")
    c, a, u, w = (add(verbs) for add in (add_collect, add_sft, add_audit, add_write))
    for verb in (a, u):
        verb.add_argument(
            "--columns", help="OURS=THEIRS,...: what the file calls prompt, documents, query, ..."
        )
        verb.add_argument("--seats", type=positive, default=16, help="outputs written at a time")
    server = ", or a chat server: http://HOST:PORT/v1"
    for verb, more in ((a, ""), (u, server), (w, server)):
        verb.add_argument(
            "--sim", required=True, help=f"{' '.join(models.PRESETS)}, a directory, or a hub id" + more
        )
        verb.add_argument("--sim-tokens", type=positive, help="most tokens of an output (600; toy: 40)")
        verb.add_argument("--temperature", type=float, default=0.8, help="of its sampling; 0 is greedy")
        verb.add_argument("--sim-prompt", help="sft, prompted, or a JSON file: system, useful, noisy, count")
    for verb in (c, a, u, w):
        verb.add_argument("--seed", type=int, default=0, help="of the adapter, the order, the sampling")
        verb.add_argument("--dtype", choices=models.DTYPES, help="of the body (bf16 on a GPU, else fp32)")
        verb.add_argument("--device", help="cuda where there is one, else cpu")
    args = p.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    models.command_line(main)
