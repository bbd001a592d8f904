"""The house: a file imports only from lower floors, and what is said once stays said once."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all that is not a test."""
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv", "runs")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def table() -> list[str]:
    """README's reading order: "train", "toy", "cli.flags", ..., from the top floor down."""
    part = (ROOT / "README.md").read_text().split("## Reading order")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([\w/.]+)`", row)]
    return [name.removesuffix(".py").rstrip("/").replace("/", ".") for name in names]


TABLE = table()


def floor(name: str) -> int | None:
    """The place of a module of ours in the table: its own, else its folder's; None of anybody else's."""
    while name:
        if name in TABLE:
            return TABLE.index(name)
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
    """An import from above ties two rooms together: neither can be read or forked alone, and README's reading
    order would be false."""
    for name, path in modules().items():
        if (path.parent / "task.py").exists() and name.partition(".")[0] not in TABLE:
            continue  # a copy of toy/
        assert floor(name) is not None, f"{name} is not in README's reading order"
        for other in imported(path, ast.parse(path.read_text())):
            same_folder = "." in name and other.partition(".")[0] == name.partition(".")[0]
            assert same_folder or floor(other) > floor(name), f"{name} imports {other}, which is above it"


def test_what_readme_names_is_there():
    """Its seven steps and its table of forks send the reader to functions: to none that was renamed."""
    part = (ROOT / "README.md").read_text().split("## The algorithm in seven steps")[1]
    named = re.findall(r"`([\w/]+\.py): ([^`]+)`((?:, `[\w.]+`)*)", part)
    assert len(named) > 20
    for file, first, more in named:
        tree, there = ast.parse((ROOT / file).read_text()), set()
        for node in tree.body:
            targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]  # tables are named, too
            there |= {x.id for x in targets if isinstance(x, ast.Name)} | {getattr(node, "name", "")}
            there |= {f"{node.name}.{f.name}" for f in getattr(node, "body", ()) if hasattr(f, "name")}
        for name in (first, *re.findall(r"[\w.]+", more)):
            assert name in there, f"README names {file}: {name}"


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


def test_every_test_that_is_named_exists():
    """RELIABILITY.md gives each promise its test: one that is renamed leaves a promise without any."""
    files = {
        p.name: set(re.findall(r"^def (test_\w+)", p.read_text(), re.MULTILINE))
        for p in ROOT.glob("tests/**/test_*.py")
    }
    file, names = "", 0
    for word in re.findall(r"\btest_\w+(?:\.py)?", (ROOT / "RELIABILITY.md").read_text()):
        if word.endswith(".py"):
            file = word
            assert file in files, file
        else:
            assert word in files[file], f"{file}: {word}"
            names += 1
    assert names > 100
