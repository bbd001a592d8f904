"""A grid of real runs to its end; its arithmetic; and what happens when it is cut or a run fails."""

import json
import math
import shutil
import subprocess
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from bench import ablate
from cli import flags as all_flags
from cli.parser import parse
from cli.screen import run as screened

TINY = "--steps 3 --questions 2 --group 2 --eval-questions 3 --rank 4"


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.setitem(ablate.GRIDS, "tiny", {"as it is": "", "no KL": "--kl 0"})


def test_a_grid_runs_to_its_end(tmp_path, grid, monkeypatch):
    """Two variants, two seeds, three steps, through train.py itself. A table of runs that shared no
    simulator, no seed or no questions would compare luck; a run whose row is there must not run again, even
    in a clone without its directory."""
    monkeypatch.setattr(ablate, "TUNING", [*ablate.TUNING, "--sft-steps", "1", "--no-audit"])
    runs, file = tmp_path / "runs", tmp_path / "A.md"
    argv = ["tiny", "--seeds", "2", "--jobs", "2", "--flags", TINY, "--out", str(runs)]
    argv += ["--rows", str(tmp_path / "docs/rows.jsonl"), "--write", "--file", str(file)]
    ablate.main(argv)
    text = file.read_text()
    assert "| as it is |" in text and "| no KL | `--kl 0` | 2 |" in text and "±" in text
    drawn = ElementTree.parse(tmp_path / "docs/ablations-tiny.svg").getroot()
    assert "".join(drawn.itertext()).count("no KL") == 1
    assert len(list(runs.rglob("result.json"))) == 6  # two of them simulators
    sims = [p.read_bytes() for p in sorted((runs / "simulators").rglob("simulator/*.safetensors"))]
    assert len(sims) == 2 and sims[0] != sims[1]
    rows = list(map(json.loads, (tmp_path / "docs/rows.jsonl").read_text().splitlines()))
    assert sorted((row["seed"], "--kl" in row["flags"]) for row in rows) == [
        *((0, False), (0, True), (1, False), (1, True)),
    ]
    for a, b in ((a, b) for a in rows for b in rows if a["seed"] == b["seed"] and a is not b):
        assert a["before"] == b["before"] and a["after_noise"]["f1"] >= 0 and a["commit"]
        assert all(len(a["curves"][name]) == 3 for name in ablate.CURVES)
        assert [a["curves"][name][0] for name in a["curves"]] == [
            b["curves"][name][0] for name in a["curves"]
        ]
    first, second = ([row["curves"] for row in rows if row["seed"] == seed] for seed in (0, 1))
    assert first != second

    def never(*_, **__):
        raise AssertionError("a run that ended ran again")

    monkeypatch.setattr(subprocess, "Popen", never)
    file.write_text(text + "\nA verdict.\n")
    shutil.rmtree(runs)
    ablate.main(argv)
    assert file.read_text() == text + "\nA verdict.\n"
    monkeypatch.setitem(ablate.GRIDS, "other", {"baseline": "", "a spelling": "--kl 0.0", "none": "--kl 1"})
    ablate.main(["other", *argv[1:], "--jobs", "0"])  # the same runs in another grid, and one that is missing
    table = file.read_text().split("## Other")[1]
    assert "| baseline |" in table and "| a spelling |" in table and "| none |" not in table
    with pytest.raises(ValueError, match="no run of the first variant of tiny"):
        ablate.main(["tiny", *argv[1:], "--jobs", "0", "--flags", "--steps 9"])


def test_the_same_flags_are_the_same_run():
    """Two spellings of a run would be run twice; two runs with one key would share figures."""
    keys = [
        ablate.settled(f"--steps 3 {x}") for x in ("--kl .1 --lr 1", "--lr 1.0 --kl 0.1", "--lr 1 --kl 2")
    ]
    assert keys[0] == keys[1] != keys[2]
    assert ablate.settled("--steps 3 --shared-coins --steps 4") == "--shared-coins --steps 4"
    assert ablate.settled("--steps 3 --policy a/b", ("policy",)) == "--policy a/b"
    a = SimpleNamespace(out="x")
    one, other = (
        ablate.simulator_of(a, ablate.settled(f), 1)[0] for f in ("--rank 4", "--policy b --rank 4")
    )
    assert one != other and one == ablate.simulator_of(a, "", 1)[0]


def test_curves_and_pairs(grid):
    """A difference is paired by seed, not by place, and never with a run of other code or another machine; a
    band that leaves out a seed is too narrow."""
    row = lambda x, **made: {"after": {"f1": x}, "curves": {"f1": [x, x, x, x]}} | made  # noqa: E731
    results = {"as it is": {0: row(0.2), 1: row(0.6), 3: row(0.6, commit="a"), 4: row(0.1, machine="A; day")}}
    others = {3: row(0.1, commit="b"), 4: row(0.9, machine="B; day")}
    results["no KL"] = {1: row(0.7), 0: row(0.3), 2: row(9.0)} | others
    line = ablate.table(SimpleNamespace(grid="tiny"), results).splitlines()[-1]
    assert "| +0.100 ± 0.000 |" in line and "| 5 |" in line
    points = ablate.curve([row(0.2), row(0.6)])
    assert [p[0] for p in points] == [1, 2, 3, 4]
    assert points[2][1:] == pytest.approx(ablate.interval([0.2, 0.6]))
    assert ablate.curve([{"curves": {"f1": [0.0, 0.0, 5.0, 0.0, 0.0]}}])[2][1] == 1.0  # smoothed, same place


def test_intervals():
    """Half a 95 % interval of four values is 3.18 standard errors, not 1.96."""
    assert ablate.interval([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(3.18 * math.sqrt(5 / 3) / 2))
    half = ablate.interval([float(i % 2) for i in range(40)])[1]
    assert half == pytest.approx(2.02 * 0.5064 / 40**0.5, rel=0.01)


def test_every_variant_is_made_of_flags_that_exist():
    """A grid with a typing error fails after hours, in its last variant; other seeds than were asked for are
    no check of a choice that the first ones made."""
    for name, variants in ablate.GRIDS.items():
        for text in variants.values():
            given = parse("", all_flags.TRAIN, text.split())
            all_flags.settle("train", given | ({} if "sft-steps" in given else {"sft-steps": 0}))
        a = SimpleNamespace(grid=name, seeds=2, first=3, out="x", flags=ablate.BOOK)
        runs = [run for mine in ablate.runs_of(a).values() for run in mine]
        assert len({out for out, *_ in runs}) == len({key for *_, key in runs}) == 2 * len(variants)
        assert {seed for *_, (_, seed) in runs} == {3, 4}
        shared = [flags for _, flags, _ in runs if "--sim-adapter" in flags]
        assert len(shared) == 2 * sum("--sim" not in v and "--sft" not in v for v in variants.values())


def test_a_run_that_fails_is_named(tmp_path, grid, capsys):
    """One failed run of thirty must not be a hole in the table, nor a traceback."""
    missing, rows = tmp_path / "no", tmp_path / "rows.jsonl"
    argv = ["tiny", "--seeds", "2", "--flags", f"--data toy --policy {missing}", "--rows", str(rows)]
    with pytest.raises(SystemExit) as stop:
        screened(lambda: ablate.main([*argv, "--out", str(tmp_path)]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "2 runs failed" in err and str(missing) in err.split("--help")[0]
    assert not rows.exists()
    with pytest.raises(ValueError, match="no grid x: there are curriculum"):
        ablate.main(["x"])
