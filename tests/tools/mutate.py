"""Which lines could be wrong with all tests green? A small mutation runner.

    python tests/tools/mutate.py grpo.py -n 40                      # 40 mutants, drawn by --seed
    python tests/tools/mutate.py train.py -n 40 --out train.jsonl   # the same again: goes on where it was cut
    python tests/tools/mutate.py train.py --out train.jsonl --again # survivors only, after tests were added
    python tests/tools/mutate.py simulator.py --tests tests/test_simulator.py tests/test_learning.py
    python tests/tools/mutate.py train.py --list                    # all mutants; none is run

A mutant differs from the file in one place of its syntax tree: a comparison, an operator, a number, a
condition, a statement, a keyword argument. The tests of the file (TESTS, or --tests) run on it in a copy of
the tree: what git tracks, and what is new. It survives where they stay green: a test is missing, or the
mutant means the same as the program. A red test kills it, or three times the time that the tests take.

Deliberately not: a part of the suite, nor a judge of equivalence. Texts, imports, annotations and decorators
are left alone; a mutated file is unparsed from its tree, so the lines of a traceback are not its own.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = {  # file -> the tests that should notice, those that notice most first
    "grpo": ["grpo", "learning"],
    "rollout": ["rollout", "injection", "learning"],
    "engine": ["rollout", "learning"],
    "questions": ["questions"],
    "simulator": ["simulator", "learning"],
    "sft": ["simulator"],
    "train": ["learning", "train"],
    "eval": ["eval", "learning"],
    "collect": ["collect"],
}
A = ast
PAIRS = [(A.Add, A.Sub), (A.Lt, A.LtE), (A.Gt, A.GtE), (A.Eq, A.NotEq), (A.Is, A.IsNot), (A.In, A.NotIn)]
SWAPS = {A.Mult: A.FloorDiv, A.FloorDiv: A.Mult, A.Div: A.Mult, A.And: A.Or, A.Or: A.And}
SWAPS |= dict(PAIRS) | {b: a for a, b in PAIRS}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum"}
DROPPED = A.Expr | A.Assign | A.AugAssign | A.Raise | A.Continue | A.Break

Change = tuple[int, str, Callable[[], object]]  # its line, what it is, and the deed


def changes(node: ast.AST) -> Iterator[Change]:
    """What can be done to one node, in place."""
    line = getattr(node, "lineno", 0)
    match node:
        case A.BinOp(op=op) | A.BoolOp(op=op) | A.AugAssign(op=op) if type(op) in SWAPS:
            new = SWAPS[type(op)]()
            yield line, f"{type(op).__name__} -> {type(new).__name__}", lambda: setattr(node, "op", new)
        case A.Compare(ops=[op, *rest]) if type(op) in SWAPS:
            new = SWAPS[type(op)]()
            yield (
                line,
                f"{type(op).__name__} -> {type(new).__name__}",
                lambda: setattr(node, "ops", [new, *rest]),
            )
        case A.Constant(value=bool(old)):
            yield line, f"{old} -> {not old}", lambda: setattr(node, "value", not old)
        case A.Constant(value=int(old) | float(old)):
            yield line, f"{old} -> {old + 1}", lambda: setattr(node, "value", old + 1)
        case A.UnaryOp(op=A.USub()):
            yield line, "without minus", lambda: setattr(node, "op", A.UAdd())
        case A.Return(value=A.expr() as old) if ast.unparse(old) != "None":
            yield line, "return None", lambda: setattr(node, "value", A.Constant(None))
        case A.Call(func=A.Name(id=name)) if name in CALLS:
            yield line, f"{name} -> {CALLS[name]}", lambda: setattr(node.func, "id", CALLS[name])
        case A.Call(func=A.Attribute(attr=name)) if name in CALLS:
            yield line, f"{name} -> {CALLS[name]}", lambda: setattr(node.func, "attr", CALLS[name])
    if isinstance(test := getattr(node, "test", None), A.expr):
        yield line, f"not ({ast.unparse(test)})", lambda: setattr(node, "test", A.UnaryOp(A.Not(), test))
    for i, test in enumerate(getattr(node, "ifs", [])):
        yield test.lineno, f"without if {ast.unparse(test)}", lambda i=i: node.ifs.pop(i)
    for i, keyword in enumerate(node.keywords if isinstance(node, A.Call) else []):
        yield keyword.value.lineno, f"without {keyword.arg or '**'}=", lambda i=i: node.keywords.pop(i)
    for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        for i, part in enumerate(block if isinstance(block, list) else []):
            told = isinstance(part, A.Expr) and isinstance(part.value, A.Constant)  # a docstring
            # a name that is never bound is a NameError, and tells nothing
            bare = isinstance(part, A.Assign) and re.fullmatch(r"[\w, ()]+", ast.unparse(part.targets[0]))
            if isinstance(part, DROPPED) and not told and not bare:
                said = ast.unparse(part).splitlines()[0]
                yield part.lineno, f"without {said}", lambda b=block, i=i: b.__setitem__(i, A.Pass())


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs, in a fixed order."""
    yield tree
    for name, value in ast.iter_fields(tree):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, A.Import | A.ImportFrom):
                    yield from nodes(child)


def mutants(source: str) -> list[tuple[str, int, int]]:
    """("line: what is changed", which node, which of its changes) of every mutant of a file."""
    tree, found = ast.parse(source), []
    for i, node in enumerate(nodes(tree)):
        found += [(f"{line}: {what}", i, j) for j, (line, what, _) in enumerate(changes(node))]
    return found


def mutate(source: str, i: int, j: int) -> str:
    """The source with the j-th change of its i-th node."""
    tree = copy.deepcopy(ast.parse(source))
    list(changes(list(nodes(tree))[i]))[j][2]()
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def copy_tree(to: Path) -> None:
    """What git tracks, as it lies there, and what is new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def run(tree: Path, tests: list[str], limit: float | None) -> str:
    """Run the tests: "" where they are green, else the first that is red, or why there is none."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "too slow"
    red = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "" if done.returncode == 0 else red[1] if red else f"pytest exits with {done.returncode}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", help="the file to mutate, from the root of the tree")
    p.add_argument("--tests", nargs="+", help="test files (or single tests) that should notice")
    p.add_argument("-n", type=int, default=40, help="mutants to sample [40]")
    p.add_argument("--seed", type=int, default=0, help="of the sample; a larger one holds the smaller [0]")
    p.add_argument(
        "--out", type=Path, help="JSON lines, a mutant a line; those that it has are not run again"
    )
    p.add_argument("--again", action="store_true", help="run the survivors in --out again")
    p.add_argument("--list", action="store_true", help="list every mutant, run none")
    a = p.parse_args()
    source = (ROOT / a.file).read_text()
    found = mutants(source)
    if a.list:
        print(*(what for what, *_ in found), f"{len(found)} mutants", sep="\n")
        return
    of = hashlib.sha256(source.encode()).hexdigest()[:12]  # a file that has changed has other mutants
    rows = [json.loads(line) for line in a.out.read_text().splitlines()] if a.out and a.out.exists() else []
    known = {row["mutant"]: row["killed"] for row in rows if row["file"] == a.file and row["of"] == of}
    tests = a.tests or [f"tests/test_{name}.py" for name in TESTS[Path(a.file).stem]]
    drawn = [(f"{what} ({i}.{j})", i, j) for what, i, j in random.Random(a.seed).sample(found, len(found))][
        : a.n
    ]
    with tempfile.TemporaryDirectory() as home:
        tree, began = Path(home), time.monotonic()
        copy_tree(tree)
        (tree / a.file).write_text(ast.unparse(ast.parse(source)) + "\n")
        if red := run(tree, tests, None):
            sys.exit(f"error: without a mutant the tests are not green: {red}")
        limit = 3 * (time.monotonic() - began) + 20
        for mutant, i, j in drawn:
            if mutant not in known or (a.again and not known[mutant]):
                (tree / a.file).write_text(mutate(source, i, j))
                known[mutant] = run(tree, tests, limit)
                print(f"{a.file}:{mutant:70} {known[mutant] or 'SURVIVES'}", flush=True)
                if a.out:
                    with open(a.out, "a") as file:
                        row = {"file": a.file, "of": of, "mutant": mutant, "killed": known[mutant]}
                        file.write(json.dumps(row) + "\n")
    alive = [mutant for mutant, *_ in drawn if not known[mutant]]
    print(
        f"\n{a.file}: {len(drawn) - len(alive)} of {len(drawn)} mutants killed ({len(found)} in all)", end=""
    )
    print("; these survive:" if alive else "", *(f"  {a.file}:{mutant}" for mutant in alive), sep="\n")


if __name__ == "__main__":
    main()
