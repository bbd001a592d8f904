"""Flags as tables: what a command accepts is a list of `Flag`s. Only this file calls argparse.

A `Flag` gives its name, type, default, bounds and meaning in one line; the table is the documentation, and
`--help` prints it. Not the tables themselves: those of the commands are in flags.py.
"""

import argparse
import math
import sys
from dataclasses import dataclass

from cli import screen

NEEDED = object()  # as a default: the flag must be given
LEAST, MOST = {int: 1, float: 0}, {int: 2**31, float: 1e37}  # of a number (AdamW's first step is ten rates)


@dataclass(frozen=True)
class Flag:
    """One flag. For a default of "" or None, the help says what happens without the flag."""

    name: str
    kind: type | tuple[str, ...]  # bool: a switch; a tuple: one of these words
    default: object
    help: str
    value: str = ""  # what --help calls its value
    cpu: object = None  # the default for a real checkpoint without a GPU, if it differs
    least: float | None = None  # lower bound; None: LEAST of its type
    most: float | None = None  # upper bound; None: MOST of its type
    many: int | str | None = None  # how many values: a number, or "+"
    bare: bool = False  # a positional argument

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    def shown(self, task: dict[str, object]) -> str:
        """The help text with the defaults; task: those of the toy task."""
        toy = None if self.kind is str else task.get(self.name)
        usual = {"": self.default, "toy": toy, "cpu": self.cpu}
        shown = {k: v for k, v in usual.items() if v not in (None, "", NEEDED) and v is not False}
        told = ", ".join(f"{k} {v}".strip() for k, v in shown.items() if not isinstance(v, tuple))
        more = f" [{told}]" if told else " (required)" if self.default is NEEDED else ""
        return (self.help + more).replace("%", "%%")

    def bounds(self) -> tuple[float, float]:
        """The least and the most that a number may be."""
        least = LEAST[self.kind] if self.least is None else self.least
        return least, MOST[self.kind] if self.most is None else self.most

    def check(self, value: object) -> None:
        """Raise ValueError for a number out of bounds."""
        if value is None or self.kind not in (int, float):
            return
        least, most = self.bounds()
        if not math.isfinite(value):
            raise ValueError(f"--{self.name} must be a number, not {value}")
        if not least <= value <= most:
            bound = f"within {least}..1" if most == 1 else f"at least {least}"
            bound = f"at most {most}" if value > most > 1 else bound
            raise ValueError(f"--{self.name} must be {bound}, not {value}")


Groups = dict[str, list[Flag]]


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage. Flags cannot be abbreviated."""

    def __init__(self, *args, **more):
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if "prog" not in more and spec:  # python -m bench, python -m toy.make
            more["prog"] = f"-m {spec.name.removesuffix('.__main__')}"
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **more, allow_abbrev=False, formatter_class=raw)

    def error(self, message: str) -> None:
        screen.fail(f"{message} (python {self.prog} --help lists the flags)")


def declare(parser: argparse.ArgumentParser, groups: Groups, task: dict[str, object]) -> None:
    """Add a table of flags to a parser. Flags that are not given are absent from its result."""
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for f in flags:
            more: dict = {"help": f.shown(task), "default": argparse.SUPPRESS}
            if f.kind is bool:
                more |= {"action": "store_true"}
            elif isinstance(f.kind, tuple):
                more |= {"choices": f.kind}
            else:
                more |= {"type": f.kind, "metavar": f.value or {int: "N", float: "X"}.get(f.kind, "TEXT")}
            more |= {} if f.bare else {"required": f.default is NEEDED}
            more |= {"nargs": f.many} if f.many else {}
            group.add_argument(f.name if f.bare else f"--{f.name}", **more)


def parse(
    doc: str, groups: Groups, argv: list[str] | None = None, task: dict | None = None
) -> dict[str, object]:
    """The flags that were given, {name: value}."""
    parser = OneLine(description=doc, usage="%(prog)s FLAGS")
    declare(parser, groups, task or {})
    return {k.replace("_", "-"): v for k, v in vars(parser.parse_args(argv)).items()}


def parse_verb(
    doc: str, verbs: dict[str, tuple[str, Groups]], argv: list[str] | None, task: dict[str, dict]
) -> tuple[str, dict[str, object]]:
    """The same for a command with verbs, {verb: (what it does, its flags)} -> (verb, flags given)."""
    parser = OneLine(description=doc)
    choices = parser.add_subparsers(required=True, metavar=" | ".join(verbs), dest="verb")
    for verb, (what, groups) in verbs.items():
        one = choices.add_parser(verb, help=what, description=what, usage=f"{parser.prog} {verb} FLAGS")
        declare(one, groups, task[verb])
    given = vars(parser.parse_args(argv))
    return given.pop("verb"), {k.replace("_", "-"): v for k, v in given.items()}


def with_defaults(groups: Groups, given: dict[str, object]) -> argparse.Namespace:
    """All flags, given or default, for a command with fixed defaults. Raises ValueError if out of bounds."""
    a = argparse.Namespace()
    for f in (f for flags in groups.values() for f in flags):
        value = given.get(f.name, f.default)
        f.check(value)
        setattr(a, f.key, False if value is NEEDED else value)
    return a
