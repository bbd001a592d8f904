"""A grid of real runs to its end; its arithmetic; and what happens when it is cut or a run fails."""

import math
import subprocess
from types import SimpleNamespace

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
    """Two variants, two seeds, three steps, through train.py itself. What is done is not done again; a table
    of runs that shared no simulator, no seed or no questions would compare luck."""
    monkeypatch.setattr(ablate, "TUNING", [*ablate.TUNING, "--sft-steps", "1"])
    argv = ["tiny", "--seeds", "2", "--jobs", "2", "--flags", TINY, "--out", str(tmp_path / "runs")]
    argv += ["--write", "--file", str(tmp_path / "A.md")]
    ablate.main(argv)
    text = (tmp_path / "A.md").read_text()
    assert "| as it is |" in text and "| no KL | `--kl 0` |" in text and "±" in text
    runs = sorted((tmp_path / "runs").rglob("result.json"))
    assert len(runs) == 6  # two of them simulators
    sims = [p.read_bytes() for p in sorted((tmp_path / "runs/simulators").rglob("simulator/*.safetensors"))]
    assert len(sims) == 2 and sims[0] != sims[1]
    for seed in "01":
        logs = [(tmp_path / "runs/tiny" / v / seed / "log.jsonl").read_text() for v in ("as-it-is", "no-KL")]
        assert [log.count("\n") for log in logs] == [3, 3]
        first = [log.splitlines()[0].split('"kl"')[0] for log in logs]
        assert first[0] == first[1]  # before anything is learnt, a pair acts alike

    def never(*_, **__):
        raise AssertionError("a run that ended ran again")

    monkeypatch.setattr(subprocess, "Popen", never)
    ablate.main(argv)
    assert (tmp_path / "A.md").read_text() == text


def test_intervals():
    """Half a 95 % interval of four values is 3.18 standard errors, not 1.96."""
    assert ablate.interval([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(3.18 * math.sqrt(5 / 3) / 2))
    half = ablate.interval([float(i % 2) for i in range(40)])[1]
    assert half == pytest.approx(2.02 * 0.5064 / 40**0.5, rel=0.01)


def test_every_variant_is_made_of_flags_that_exist():
    """A grid with a typing error fails after hours, in its last variant."""
    for name, variants in ablate.GRIDS.items():
        for text in variants.values():
            given = parse("", all_flags.TRAIN, text.split())
            all_flags.settle("train", given | ({} if "sft-steps" in given else {"sft-steps": 0}))
        a = SimpleNamespace(grid=name, seeds=2, out="x", flags="")
        places = [out for out, _ in ablate.runs_of(a)]
        assert len(set(places)) == len(places) == 2 * len(variants)
        shared = [flags for _, flags in ablate.runs_of(a) if "--sim-adapter" in flags]
        assert len(shared) == 2 * sum("--sim" not in v and "--sft" not in v for v in variants.values())


def test_a_run_that_fails_is_named(tmp_path, grid, capsys):
    """One failed run of thirty must not be a hole in the table, nor a traceback."""
    with pytest.raises(SystemExit) as stop:
        argv = ["tiny", "--seeds", "2", "--flags", "--group 0", "--out", str(tmp_path)]
        screened(lambda: ablate.main(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "2 runs failed" in err and "--group must be at least 1" in err
    with pytest.raises(ValueError, match="no grid x: there are curriculum"):
        ablate.main(["x"])
