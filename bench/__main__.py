"""Speed and memory of the engine and the learner against transformers and TRL, measured side by side.

    python -m bench                                   every section, with the toy body
    python -m bench --checkpoint DIR                  and with a real one (without a GPU: a small one)
    python -m bench --only sampling,memory --write    some sections; --write puts them into BENCH.md
    python -m bench --quick                           the same code in seconds: a smoke run, no real figures
    python -m bench --plan 3b --memory 24             what fits into 24 GiB, and with which settings

Each row is a ratio. Ours and theirs alternate in the same run, with the same checkpoint, prompts, type,
threads and number of tokens; figures are medians, with the spread of the ratio. The peers (transformers'
`generate`, TRL's GRPOTrainer with PEFT) are in requirements-bench.txt; without its peer a row says so.

Not a test: tests/test_bench.py checks that it runs and that its arithmetic is right.
"""

import argparse
import os
import platform
import re
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from cli import plan, screen
from cli.disk import read_json
from cli.flags import SIM_BITS
from cli.parser import Flag, parse, with_defaults

from .bits import bits
from .counts import counts
from .decoding import episodes, profile, sampling
from .gpu import gpu
from .growth import growth, memory
from .timing import HEADS, Run
from .training import training
from .work import installed

CARDS = 12, 16, 24, 48, 80  # GiB
ALONE = ("3b", 0), ("3b", 8), ("3b", 4), ("7b", 0), ("7b", 8), ("7b", 4), ("14b", 0), ("14b", 8), ("14b", 4)
SIMULATED = (("3b", 0), ("7b", 8)), (("3b", 0), ("14b", 8)), (("3b", 0), ("14b", 4)), (("7b", 4), ("14b", 4))
PAIRS = *((one,) for one in ALONE), *SIMULATED

# Each yields its rows, given a Run; its docstring says what is measured.
SECTIONS = {f.__name__: f for f in (counts, sampling, bits, episodes, profile, training, growth, memory, gpu)}


def about() -> str:
    """The machine, the versions and the date, in one line."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    cpu = f"{os.cpu_count()}-core {found[1] if found else platform.processor()}, no GPU"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    names = filter(installed, ("torch", "transformers", "peft", "trl"))
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{where}; Python {platform.python_version()}, {versions}; {time.strftime('%Y-%m-%d')}"


def put(text: str, name: str, body: str) -> str:
    """Replace the text between the markers of a section; a section that is missing goes to the end."""
    begin, end = f"<!-- bench: {name} -->", f"<!-- /bench: {name} -->"
    block = f"{begin}\n{body}\n{end}"
    if begin not in text:
        return text.rstrip("\n") + f"\n\n## {name.capitalize()}\n\n{block}\n"
    head, rest = text.split(begin, 1)
    if end not in rest:
        raise ValueError(f"BENCH.md has {begin} but no {end} after it: put it back")
    return head + block + rest.split(end, 1)[1]


# fmt: off
FLAGS = {
    "what is measured": [
        Flag("only", str, ",".join(SECTIONS), "sections, comma-separated", "A,B"),
        Flag("checkpoint", str, "", "a Hugging Face directory, in addition to the toy body", "DIR"),
        Flag("corpus", str, "", "passages that `bits` reads (JSON lines; README.md if not given)", "FILE"),
        Flag("threads", int, os.cpu_count(), "threads for the checkpoint; the toy body has 1"),
        Flag("seconds", float, 20.0, "spent on repeating a row (at least 2 runs)"),
        Flag("quick", bool, False, "a smoke run: tiny sizes, meaningless figures"),
        Flag("write", bool, False, "put the tables into --file"),
        Flag("file", str, "BENCH.md", "what --write writes to", "FILE"),
    ],
    "a plan, instead of measuring": [
        Flag("plan", str, "", "the policy's body, a preset or directory; cards: a table of pairs", "BODY"),
        Flag("sim", str, "", "the simulator's body, if it is another", "BODY"),
        Flag("bits", ("8", "4"), "", "of the bodies' frozen matrices (bf16)"),
        SIM_BITS,
        Flag("memory", float, None, "memory of the GPU; 24 if not given", "GIB"),
        Flag("seat-tokens", int, 4096, "capacity of a seat"),
        Flag("rank", int, 16, "rank of the adapters"),
    ],
}
# fmt: on


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    if a.plan:
        if a.sim_bits and a.sim in ("", a.plan):
            raise ValueError("--sim-bits is for a --sim that is another body: leave it out, or give --bits")
        return a
    if a.sim or a.bits or a.sim_bits or a.memory is not None:
        raise ValueError("--sim, --bits and --memory belong to --plan BODY: give that too, or leave them out")
    a.only = [n for n in a.only.split(",") if n]
    unknown = [n for n in a.only if n not in SECTIONS]
    if unknown or not a.only:
        wrong = f"no section {', '.join(unknown)}" if unknown else "--only names no section"
        raise ValueError(f"{wrong}: there are {', '.join(SECTIONS)}")
    if a.quick and a.write:
        raise ValueError("--quick measures nothing worth keeping: leave out --write")
    if a.checkpoint:
        read_json(Path(a.checkpoint) / "config.json", "a checkpoint directory")
    return a


def print_plan(a: argparse.Namespace) -> None:
    """The largest settings that fit, and the bytes of each part."""
    named = {a.plan: a.bits} | ({a.sim: a.sim_bits or a.bits} if a.sim else {})
    bodies = [replace(plan.shape(name), bits=int(bits or 0)) for name, bits in named.items()]
    s = plan.Settings(seat_tokens=a.seat_tokens, rank=a.rank, sim_rank=a.rank)
    memory = 24.0 if a.memory is None else a.memory
    s, b = plan.fit(bodies, memory * 2**30, s)
    shown = " with ".join(name + (f" in {bits} bits" if bits else "") for name, bits in named.items())
    print(f"{shown} in {memory:g} GiB: {s}\n{plan.table(b)}")


def print_cards(a: argparse.Namespace) -> None:
    """Policy, simulator, bits of either: GiB of the weights, thousands of tokens that each card caches."""
    s = plan.Settings(seat_tokens=a.seat_tokens, rank=a.rank, sim_rank=a.rank)
    print(f"| policy + simulator | weights, GiB | {' | '.join(f'{n} GiB' for n in CARDS)} |")
    print("|---|" + "---:|" * (1 + len(CARDS)))
    for pair in PAIRS:
        bodies = [replace(plan.shape(name), bits=bits) for name, bits in pair]
        cells = [f"{sum(plan.weights(c, s) for c in bodies) / 2**30:.1f}"]
        for gib in CARDS:
            try:
                fit, _ = plan.fit(bodies, gib * 2**30, s)
                cells.append(f"{plan.cached(fit) / 1000:,.0f}{' r' * bool(fit.recompute)}{' c' * fit.lend}")
            except ValueError:
                cells.append("")
        shown = [name + (f" ({bits} bits)" if bits else "") for name, bits in pair]
        print(f"| {' + '.join(shown)}{' in both roles' * (len(pair) == 1)} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and with --write put each section into the file as soon as it is done."""
    a = parse_arguments(argv)
    if a.plan:
        return print_cards(a) if a.plan == "cards" else print_plan(a)
    p = Run(a.checkpoint, a.quick, a.threads, a.seconds, a.corpus)
    print(about(), flush=True)
    for name in a.only:
        told, table = " ".join(SECTIONS[name].__doc__.split()), [HEADS, ("---",) * len(HEADS)]
        print(f"\n{name}: {told}\n", flush=True)
        for row in SECTIONS[name](p):
            table.append(row.cells())
            print("  ".join(filter(None, table[-1])), flush=True)
        if a.write:
            file = Path(a.file)
            text = file.read_text(encoding="utf-8") if file.exists() else "# Bench\n"
            lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
            file.write_text(put(text, name, f"{told}\n{about()}.\n\n{lines}"), encoding="utf-8")


if __name__ == "__main__":
    screen.run(main)
