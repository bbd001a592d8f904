"""The house: a file imports only from lower floors, and what is said once stays said once."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A folder stands for its files; a file of it that stands on another floor is named.
FLOORS = {
    "cli": 0,
    "cli.parser": 0,
    "cli.disk": 0,
    "cli.screen": 0,
    "cli.track": 0,
    "kernels": 1,
    "tokenizer": 1,
    "words": 1,
    "model": 2,
    "weights": 3,
    "servers": 2,
    "cli.plan": 4,
    "rollout": 3,
    "recipes": 1,
    "grpo": 4,
    "compat": 4,
    "evaluation.modes": 4,
    "search": 4,
    "questions": 5,
    "simulator": 6,
    "tasks": 6,
    "evaluation": 6,
    "toy": 7,
    "cli.flags": 8,
    "cli.setting": 9,
    "prepare.rows": 7,
    "prepare.sft": 8,
    "prepare.collect": 9,
    "prepare.command": 10,
    "eval": 10,
    "train": 11,
    "look": 7,
    "bench": 12,
}
# toy.make pre-trains the body: it borrows the batches of fine-tuning.
LIFTED = {"toy.make": 9}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all that is not a test."""
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv", "runs")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def floor(name: str) -> int | None:
    """The floor of a module of ours: its own, else its folder's; None of anybody else's."""
    while name:
        if name in FLOORS | LIFTED:
            return (FLOORS | LIFTED)[name]
        name = name.rpartition(".")[0]
    return None


def imported(path: Path, tree: ast.Module) -> set[str]:
    """The modules of ours that a file imports, wherever in it, except where it is run as a command."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.dump(n.test))]
    names, ours = set(), modules()
    for node in (node for part in body for node in ast.walk(part)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name in ours} or {node.module}
    return {name for name in names if floor(name) is not None}


def test_imports_go_down():
    """An import from the same floor or above ties two rooms together: neither can be read or forked alone."""
    for name, path in modules().items():
        if path.name == "__init__.py" and not path.read_text().count("import "):
            continue
        assert floor(name) is not None, f"{name} needs a floor"
        for other in imported(path, ast.parse(path.read_text())):
            same_room = other.partition(".")[0] == name.partition(".")[0]
            down = floor(other) < floor(name) or (same_room and floor(other) == floor(name))
            assert down, f"{name} imports {other}"


def test_kernels_know_nothing_of_the_project():
    """A kernel that knows of the model cannot be taken to another project. (The commands beside them declare
    their flags as all commands do.)"""
    for path in (ROOT / "kernels").rglob("*.py"):
        others = {n for n in imported(path, ast.parse(path.read_text())) if not n.startswith("kernels")}
        command = path.stem in ("__main__", "choices", "compile_check")
        assert others <= ({"cli.parser"} if command else set()), path.name


def calls(name: str) -> set[str]:
    """The modules that call a function or method of that name."""
    found = set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                found |= {module} if called == name else set()
    return found


def test_what_is_said_once():
    """Flags declared in two styles drift apart; a pickle runs whatever its author wrote into it; a second
    class of rows is a second way to lose them."""
    assert calls("add_argument") == {"cli.parser"}
    for node in (n for p in modules().values() for n in ast.walk(ast.parse(p.read_text()))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("save", "load"), "torch.save and torch.load are pickles"
    assert calls("truncate") == {"cli.disk"}, "rows that survive a cut are kept in one place"


def test_commands_ask_their_task_and_never_which_it_is():
    """A command that asks for the toy world cannot be given another task."""
    for name in ("train", "eval", "simulator", "prepare.command", "cli.setting"):
        for node in ast.walk(ast.parse(modules()[name].read_text())):
            if isinstance(node, (ast.If, ast.IfExp, ast.While)):
                assert "toy" not in ast.dump(node.test).lower(), f"{name}, line {node.lineno}"


def test_every_known_defect_has_a_test():
    """The paper's code had twelve kinds of defects; a test that tells the story of each must stay."""
    told = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                story = re.match(r"Defects? ([\d, and]+):", ast.get_docstring(node) or "")
                told |= {int(n) for n in re.findall(r"\d+", story[1])} if story else set()
    assert told >= set(range(1, 13)), f"untold: {set(range(1, 13)) - told}"
