"""The long part itself: what it keeps, where it goes on, and what it counts."""

from types import SimpleNamespace

import pytest

from cli.disk import Rows

from .__main__ import attempt, table

BAR = SimpleNamespace(update=lambda n: None)


def test_the_long_part_goes_on_where_it_was_cut_and_counts_what_survived(tmp_path, capsys):
    """A fault tried twice, one that is lost where the command is cut, or two where an error has a semicolon:
    the table of RELIABILITY.md would say so."""
    tries, sent = [], []

    def cases(cut_at):
        for name, end in [
            ("one", (1, "")),
            ("two", (1, "exit code 1; Traceback; line")),
            ("many", (1000, ["3: hung", "7: a; b"], "slow")),
            ("last", (5, [])),
        ]:

            def run(name=name, end=end):
                tries.append(name)
                if name == cut_at:
                    raise KeyboardInterrupt
                return end

            sent.append((yield name, run))

    with pytest.raises(KeyboardInterrupt):
        attempt("kill", cases("many"), Rows(tmp_path / "rows", resume=True, key=key), BAR)
    rows = Rows(tmp_path / "rows", resume=True, key=key)
    attempt("kill", cases(""), rows, BAR)
    rows.add({"kind": "fuzz", "case": "one", "tried": 2, "wrong": []})
    assert tries == ["one", "two", "many", "many", "last"] and sent == [1, 1, 1, 1, 1000, 5]
    assert "kill, many: 7: a; b\n" in "".join(capsys.readouterr())
    lines = [line.split() for line in table(rows.rows.values()).splitlines()]
    assert lines[0][-2:] == ["tried", "survived"]
    assert lines[-2:] == [["kill", "1007", "1004"], ["fuzz", "2", "2"]]
    assert rows.rows["kill", "many"]["note"] == "slow"


def key(row):
    return row["kind"], row["case"]
