"""The house: a file imports only from lower floors, so that each can be read without those above it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "kernels": 0,
    "model": 1,
    "tokenizer": 1,
    "rollout": 2,
    "servers": 2,
    "plan": 2,
    "search": 3,
    "grpo": 3,
    "sft": 3,
    "prompts": 3,
    "modes": 3,
    "questions": 4,
    "toy": 4,
    "collect": 5,
    "report": 5,
    "simulator": 6,
    "eval": 7,
    "train": 8,
    "bench": 8,
}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & FLOORS.keys()


def test_imports_go_down():
    """An import from the same floor or above ties two rooms together: neither can be read or forked alone."""
    files = [p for p in ROOT.glob("*.py")]
    assert {p.stem for p in files} <= FLOORS.keys(), "a new file needs a floor"
    for path in files:
        for name in imported(path):
            assert FLOORS[name] < FLOORS[path.stem], f"{path.name} imports {name}"


def test_kernels_know_nothing_of_the_project():
    """A kernel that knows of the model cannot be taken to another project."""
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imported(path) <= {"kernels"}, path.name


def test_every_known_defect_has_a_test():
    """The paper's code had twelve kinds of defects; a test that tells the story of each must stay."""
    told = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                story = re.match(r"Defects? ([\d, and]+):", ast.get_docstring(node) or "")
                told |= {int(n) for n in re.findall(r"\d+", story[1])} if story else set()
    assert told >= set(range(1, 13)), f"untold: {set(range(1, 13)) - told}"
