"""The command `python simulator.py collect | sft | audit | write`: what prepares a simulator and measures it.

Not the work itself: collect.py collects, sft.py fine-tunes, ../simulator.py writes and audits.
"""

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import simulator as simulators
from cli import disk, flags, ranks
from cli.screen import side_by_side, table
from cli.setting import Setting, load
from model import POLICY, SIMULATOR, Model
from prepare import sft
from prepare.collect import Collector, Sorted, agreement, all_rows, collect, sort_rows
from prepare.rows import COLUMNS, read_rows, row_query, write_rows
from questions import load_questions
from rollout import Query, Question
from simulator import addressed
from tasks import Task, kind

STATE_FILE, RESULT_FILE = "state.safetensors", "sft.json"


def main(argv: list[str] | None = None) -> None:
    verb, given = flags.given_to_verb(simulators.__doc__, argv)
    a = flags.settle(verb, given)
    verbs = {"collect": command_collect, "sft": command_sft, "audit": command_audit, "write": command_write}
    verbs[verb](a, kind(a.task)(a))


# -------------------------------------------------------------------------------------------- audit and write


def command_audit(a: argparse.Namespace, task: Task) -> None:
    """Print, and with --json save, what a simulator is worth on held-out queries."""
    if a.rows:
        queries = [row_query(row) for row in read_rows(a.rows, column_names(a.columns))]
    else:
        questions = load_questions(a.data, a.limit)
        queries = [Query(q.text.rstrip("? "), q) for q in questions]  # without the mark, as policies search
    queries = addressed(queries[: a.limit], a.seed)
    s = load(a, task)
    engine = simulators.engine_for(body_of(s), s.simulator, queries, a.seats, a.pages)
    figures = simulators.audit(engine, s.simulator, queries)
    print(table({f"asked for {quality}": part for quality, part in figures.items()}))
    if a.json:
        disk.write_json(a.json, {"audit": figures, "flags": vars(a)})


def body_of(s: Setting) -> Model | None:
    """The simulator's body; None where it runs on a server."""
    return s.bodies[SIMULATOR][0] if SIMULATOR in s.bodies else None


def command_write(a: argparse.Namespace, task: Task) -> None:
    """Print what the simulator writes for one query: useful on the left, noisy on the right."""
    query = Query(a.query, Question(a.question, (a.answer,)), (a.seed, 0, 0, 0, 0))
    s = load(a, task)
    engine = simulators.engine_for(body_of(s), s.simulator, [query], 2)
    useful, noisy = (simulators.write(engine, s.simulator, [query], order)[0].text for order in (False, True))
    print(side_by_side(f"USEFUL\n{useful}", f"NOISY\n{noisy}"))


# ------------------------------------------------------------------------------------------------ fine-tuning


def column_names(text: str) -> dict[str, str]:
    """ "prompt=instruction,documents=output" -> {"prompt": "instruction", "documents": "output"}."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if not all(ours and sign and theirs for ours, sign, theirs in pairs):
        raise ValueError(f"--columns is OURS=THEIRS, comma-separated, not {text!r}")
    known = ("prompt", "earlier", *COLUMNS)
    if unknown := [ours for ours, _, _ in pairs if ours not in known]:
        raise ValueError(f"--columns {unknown[0]}=...: there is no such column of ours: {', '.join(known)}")
    return {ours: theirs for ours, _, theirs in pairs}


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


def command_sft(a: argparse.Namespace, task: Task) -> None:
    """Fine-tune, show progress, save every --every steps; held-out figures before and after."""
    out, columns = Path(a.out), column_names(a.columns)
    rows = read_rows(a.rows, columns)
    if a.held_rows:
        exam = read_rows(a.held_rows, columns)[: a.held]
    else:
        exam, rows = split_by_question(rows, a.held, a.seed)
    with disk.claimed(out, a.resume):
        tune(a, task, SIMULATOR, rows, exam, encoder, partial(audited, a, exam))


def encoder(s: Setting) -> Callable[[dict], sft.Example]:
    """How a simulator's rows become ids."""
    tok = s.bodies[SIMULATOR][1]
    return partial(sft.example, tok, s.simulator.words, sft.end_of_turn(tok))


def audited(a: argparse.Namespace, exam: list[dict], s: Setting, when: str) -> dict:
    """The audit of a simulator on held-out rows."""
    if not (queries := addressed([row_query(row) for row in exam[: a.audit]], a.seed)):
        return {}
    engine = simulators.engine_for(s.bodies[SIMULATOR][0], s.simulator, queries, a.seats, a.pages)
    return simulators.audit(engine, s.simulator, queries, f"audit {when}")


def tune(
    a: argparse.Namespace, task: Task, role: int, rows: list[dict], exam: list[dict],
    encoder: Callable[[Setting], Callable[[dict], sft.Example]],
    audit: Callable[[Setting, str], dict] = lambda s, when: {},
) -> None:  # fmt: skip
    """The fine-tuning of a role, in a directory that is ours: a simulator's on rows, a policy's on traces."""
    if ranks.world() > 1:
        raise ValueError("fine-tuning is the work of one process: start it without torchrun")
    settings, out = settings_of(a), Path(a.out)
    asked = {"flags": disk.pinned(settings), "rows": disk.fingerprint([rows, exam])}
    state, facts = unfinished(out, asked, a.resume)
    s = load(a, task)
    body, encode = s.bodies[role][0], encoder(s)
    adapter, optimizer = body.adapter(role), sft.adamw(body, role)
    print(f"{len(rows)} rows, {len(exam)} held out, {adapter.numel():,} parameters to train, {body.device}")

    def look(when: str) -> dict:
        """{"loss": nats a token of the held-out rows, "audit": ...}; {} where nothing is held out."""
        loss = sft.held_out_loss(body, role, [encode(row) for row in exam], a.micro) if exam else None
        return {"loss": loss, "audit": audit(s, when)} if exam else {}

    if state:
        with disk.readable(out / STATE_FILE):
            disk.fill(adapter, state["adapter"])
            disk.unpack_optimizer(optimizer, state)
    facts = facts or asked | {"step": 0, "before": look("before")}
    run = sft.fine_tune(
        body, role, rows, encode, a.steps, a.lr, tokens=a.tokens, exam=exam, every=a.every,
        seed=a.seed, micro=a.micro, optimizer=optimizer, done=facts["step"],
    )  # fmt: skip
    for p in run:
        if p.step % 10 == 0 or p.held is not None:
            print(p, flush=True)
        if p.step % a.every == 0 or p.step == a.steps:
            facts["step"] = p.step
            s.keep(role, out)
            tensors = {"adapter": adapter.detach()} | disk.pack_optimizer(optimizer)
            disk.save_state(out / STATE_FILE, tensors, facts)
    before, after = facts["before"], look("after")
    result = {"before": before, "after": after, "rows": len(rows), "held": len(exam), "flags": settings}
    disk.write_json(out / RESULT_FILE, result)
    print(report(before, after, ": --held-rows FILE" if a.command == "sft" else ""))
    (out / STATE_FILE).unlink()
    print(f"saved to {out}")


def settings_of(a: argparse.Namespace) -> dict:
    """The flags that decide what a fine-tuning learns."""
    return {k: v for k, v in vars(a).items() if k not in ("command", "resume", "out", "device", "seats")}


def unfinished(out: Path, asked: dict, resume: bool) -> tuple[dict, dict]:
    """The state to go on from, ({}, {}) for a new run. Raises ValueError for other flags or rows."""
    if not resume:
        return {}, {}
    if not (out / STATE_FILE).exists():
        if (out / RESULT_FILE).exists() or not any(out.iterdir()):
            raise ValueError(f"{out} holds no unfinished run to resume")
        return {}, {}  # cut before its first save: traces are there
    path = out / STATE_FILE
    state, facts = disk.load_state(path, "a fine-tuning", flags=dict, before=dict, step=int)
    if "adapter" not in state or facts["before"].keys() not in (set(), {"loss", "audit"}):
        raise ValueError(f"{path} is not the state of a fine-tuning: is --out right?")
    disk.same_flags(facts["flags"], asked["flags"], out)
    if not 0 <= facts["step"] <= asked["flags"]["steps"]:
        raise ValueError(f"{path} has taken {facts['step']} steps: it is not of this run")
    if facts.get("rows", asked["rows"]) != asked["rows"]:  # earlier versions kept none
        raise ValueError(f"{out} was begun with other rows: resume with the same")
    return state, facts


def report(before: dict, after: dict, advice: str = "") -> str:
    """Held-out loss and audit, before and after; advice: what helps where nothing was held out."""
    if not before:
        return f"nothing was held out: no loss, no audit (too few rows, or only one question{advice})"
    loss = f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f} nats a token"
    audits = (("before", before["audit"]), ("after", after["audit"]))
    lines = {f"{when} {quality}": part for when, figures in audits for quality, part in figures.items()}
    return f"{loss}\n{table(lines)}" if lines else loss


# ------------------------------------------------------------------------------------------------- collecting


def command_collect(a: argparse.Namespace, task: Task) -> None:
    """Let a policy search with a real engine, label what it found, write a balanced set of rows."""
    out = Path(a.out)
    free = ("command", "out", "resume", "rows", "judge", "samples", "seats", "device", "dtype")
    settings = disk.pinned({k: v for k, v in vars(a).items() if k not in free})
    questions = task.to_collect()
    questions = random.Random(a.seed).sample(questions, len(questions))
    search = task.search(a.search)
    path = out.with_name(f"{out.name}.episodes")
    log = disk.Rows(path, settings, a.resume, lambda row: row["episode"], must=True)
    collected_before(log, questions, a)
    s = load(a, task)
    room = s.engine.pools[POLICY].capacity
    how = (task.judge, a.temperature, a.force_search, room, task.shown)
    collector = Collector(s.tok, search, s.limits, s.words, *how)
    go_on = f"the episodes so far are in {log.path}: the same command with --resume goes on"
    try:
        wanted = (a.judge, a.rows, a.samples, a.seed)
        found = collect(s.engine, collector, questions, log, *wanted, rounds=4 * a.seats * ranks.world())
    except OSError as e:  # a search engine that fails
        raise OSError(f"{e}; {go_on}") from None
    except KeyboardInterrupt:
        print(f"\n{go_on}", file=sys.stderr)
        raise
    print(tally(log, found, a))
    check_found(log, found, a)
    if not ranks.rank():
        write_rows(found.rows(a.rows), out)
    print(f"{found.balanced(a.rows)} rows in {out}; every episode in {log.path}")


def collected_before(log: disk.Rows, questions: list[Question], a: argparse.Namespace) -> None:
    """Raise ValueError for a log with episodes of other questions, or with rows that are none."""
    with disk.readable(log.path):
        for number, done in log.rows.items():
            if number < 0:
                raise ValueError(f"{log.path} has an episode {number}: there is none")
            q = questions[number % len(questions)]
            if (done["question"], done["golden_answers"]) != (q.text, list(q.answers)):
                raise ValueError(f"{log.path} was begun with other questions: resume with the same --data")
        tally(log, sort_rows(log.rows, a.judge), a)


def tally(log: disk.Rows, found: Sorted, a: argparse.Namespace) -> str:
    """What was collected, what the labels say of it, and what is left out."""
    raw, forced = all_rows(log.rows), sum(e["forced"] for e in log.rows.values())
    used = found.balanced(a.rows)
    surplus = len(found.useful) + len(found.noisy) - used
    aside = "".join(f", {n} {why}" for why, n in sorted(found.aside.items()))
    return (
        f"{len(log.rows):,} episodes made {len(raw):,} searches ({forced:,} forced)\n{agreement(raw)}\n"
        f"quality by {a.judge}: {len(found.useful):,} useful, {len(found.noisy):,} noisy; "
        f"{used:,} used, left aside: {surplus:,} to balance{aside}"
    )


def check_found(log: disk.Rows, found: Sorted, a: argparse.Namespace) -> None:
    """Raise ValueError, with advice, where there is nothing to write; say so where there is too little."""
    if not all_rows(log.rows):
        advice = "--force-search searches for the question itself; else take a larger policy, or an --adapter"
        raise ValueError(f"{a.policy} made no search in {len(log.rows)} episodes: {advice}")
    if not found.balanced(a.rows):
        lacking = "useful" if not found.useful else "noisy"
        advice = "try another --judge with --resume, more questions, or more --samples"
        raise ValueError(f"no row is {lacking} by --judge {a.judge}: {advice}")
    if found.balanced(a.rows) < a.rows // 2 * 2:
        print(f"fewer than {a.rows} rows: --resume with more --samples goes on")
