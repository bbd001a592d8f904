"""Several processes do what one does: they are started by torchrun, on gloo, and compared with this process.

tests/tools/together.py is what each of them runs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port
from test_eval import lines_file

import eval
import train
import weights
from cli import disk, ranks
from cli.pause import Pause, saving_on_failure

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    *("--steps", "4", "--group", "4", "--eval-questions", "5", "--sft-steps", "2", "--save-every", "9"),
    *("--show-every", "9", "--turn-tokens", "6", "--turns", "1", "--seats", "24"),
]
TOY = ["--policy", str(ROOT / "toy/body"), "--data", "toy"]  # it searches: a random body never does
ASKED = ["--device", "cpu", *TOY, "--temperature", "1", "--search", "toy", "--seats", "1"]
TRAIN = {  # five questions: the shares are unequal; one: a process has nothing to do
    "grpo": ["--questions", "5", "--micro-tokens", "300", "--eval-every", "2", "--updates", "2"],
    "two bodies": [  # AdamW makes rounding as large as the rate
        *(*TOY, "--sim", "tiny", "--questions", "5", "--no-audit"),
        *("--turns", "2", "--turn-tokens", "20", "--lr", "1e-4"),
    ],
    "ppo": ["--questions", "5", "--algorithm", "ppo", "--no-audit"],
    "dapo": ["--questions", "1", "--algorithm", "dapo", "--normaliser", "prompt", "--no-audit"],
}


def start(n: int, **work) -> subprocess.Popen:
    """torchrun with n processes (0: one without torchrun)."""
    port = str(free_port())  # another torchrun may have the usual one
    run = ["-m", "torch.distributed.run", "--master_port", port, "--nproc_per_node", str(n)] if n else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *run, str(ROOT / "tests/tools/together.py"), json.dumps(work)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def everything(body: Path, out: Path, n: int) -> Path:
    """Train, evaluate, collect and audit with n processes -> the directory of all results."""
    data = lines_file(out / "q.jsonl", *({"question": f"home {i}", "answer": "Lima"} for i in range(7)))
    common = ["--device", "cpu", "--policy", "tiny", "--turns", "1", "--turn-tokens", "6"]
    asked = [*ASKED, "--limit", "7"]
    rows = ["--force-search", "--rows", "4", "--judge", "answer", "--limit", "60", "--seats", "4"]
    runs = [["train", "--out", str(out / name), *SHORT, *more] for name, more in TRAIN.items()]
    runs += [["eval", *asked, "--json", str(out / "eval.json")]]
    audit = ["audit", "--sim", "tiny", "--data", str(data), "--device", "cpu"]
    audit += ["--sim-prompt", "short", "--sim-tokens", "8", "--json"]
    collect = ["collect", *common, "--data", "toy", "--search", "toy", "--out", str(out / "rows"), *rows]
    runs += [["prepare.command", *audit, str(out / "audit.json")], ["prepare.command", *collect]]
    process = start(n, body=str(body), ids=str(out / "ids"), runs=runs)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (out / "printed").write_text(printed)
    return out


@pytest.fixture(scope="module")
def alone(body, tmp_path_factory) -> Path:
    return everything(body, tmp_path_factory.mktemp("alone"), 0)


def nearly(a, b, of: str = "") -> None:
    """Equal but for rounding, padding, and what a clock or a path says."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), of
        for key in a:
            if not re.search("second|padding|^out$|^json$|^data$|seats", key):
                nearly(a[key], b[key], f"{of}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), of
        for i, pair in enumerate(zip(a, b)):
            nearly(*pair, f"{of}.{i}")
    else:
        rounded = 0.011 if re.search("ratios|logps|advantage", of) else 2e-6  # digits on disk
        assert a == (pytest.approx(b, rel=1e-4, abs=rounded) if isinstance(a, float) else b), of


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def equal_states(one: Path, other: Path) -> None:
    """Two runs have learnt the same, but for the order of sums in fp32."""
    (left, facts), (right, others) = (disk.load_state(out / "state.safetensors") for out in (one, other))
    assert left.keys() == right.keys() and facts["updates"] == others["updates"] >= 4
    for name, tensor in left.items():
        near = torch.isclose(tensor, right[name], rtol=1e-4, atol=2e-6)
        if "." in name:  # of the optimiser: sums of gradients
            assert near.all(), name
        else:  # AdamW makes rounding of a gradient that is nearly nothing as large as the rate
            assert near.float().mean() > 0.999, name
            assert torch.allclose(tensor, right[name], rtol=1e-4, atol=1e-4), name
    assert not torch.equal(left["policy"], torch.zeros_like(left["policy"]))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_several_processes_do_what_one_does(alone, body, tmp_path, n):
    """A question that is counted twice or never, weights over the tokens of one process, whitening by parts,
    a lost share of the gradient: each would show in ids, adapters, figures or files. What two processes print
    twice, or both write, would show too."""
    together = everything(body, tmp_path, n)
    sampled = [(out / "ids").read_text().splitlines() for out in (alone, together)]
    assert sampled[0] == sampled[1] and len(sampled[0]) >= 16
    assert all(row["searches"] for row in rows(alone / "two bodies/log.jsonl"))
    for name in TRAIN:
        equal_states(alone / name, together / name)
        for file in ("log.jsonl", "episodes.jsonl"):
            nearly(rows(alone / name / file), rows(together / name / file), name)
        nearly(*(json.loads((out / name / "result.json").read_text()) for out in (alone, together)))
        assert (together / name / "policy/adapter_model.safetensors").exists()
    states = (disk.load_state(out / "ppo/state.safetensors")[0] for out in (alone, together))
    assert torch.equal(*(tensors["simulator"] for tensors in states))
    for file in ("eval.json", "audit.json"):
        nearly(*(json.loads((out / file).read_text()) for out in (alone, together)), file)
    assert (alone / "rows").read_text() == (together / "rows").read_text()
    of = {row["episode"]: row for row in rows(alone / "rows.episodes")[1:]}
    logged = rows(together / "rows.episodes")[1:]
    assert len({row["episode"] for row in logged}) == len(logged) >= len(of) > 4
    assert all(of.get(row["episode"], row) == row for row in logged)
    assert {p.name for p in together.iterdir()} == {p.name for p in alone.iterdir()}
    lines = [(out / "printed").read_text().count("\n") for out in (alone, together)]
    assert lines[0] == lines[1]


END = [
    # who ends how, whether the others are busy elsewhere, with how many the run goes on, steps that are kept
    ([1, 2, "SIGKILL"], True, 3, 2),
    ([0, 2, "SIGKILL"], False, 0, 0),
    ([1, 2, "SIGINT"], False, 0, 3),
    ([1, 2, "no search engine"], False, 2, 2),
]


def judge(a, trajectories):
    """As in together.py."""
    return torch.tensor([(sum(t.ids) % 97) / 97 for t in trajectories]).view(-1, a.group)


@pytest.mark.parametrize("die, wait, n, kept", END)
def test_whoever_ends_ends_all_and_the_run_goes_on(alone, body, tmp_path, monkeypatch, die, wait, n, kept):
    """A process that waits for one that is gone holds its GPU until somebody looks. All end within 30 s with
    one line, whole steps are saved by the first process while it lives, and any number of processes goes on
    to the same result. No two of them share a directory: only the first one's is read and written."""
    out, apart = tmp_path / "0/ppo", str(tmp_path)
    run = ["train", "--out", "ppo", *SHORT, *TRAIN["ppo"]]
    process = start(2, body=str(body), apart=apart, die=die, wait=wait, runs=[run])
    printed, errors = process.communicate(timeout=300)
    took = time.time() - (tmp_path / str(die[0]) / "ppo.died").stat().st_mtime
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode and took < 30, (took, errors)
    if die[2] == "SIGINT":
        assert not ours and "go on with: python train.py --out ppo " in printed
    else:
        assert len(ours) == 1 and "--resume" in ours[0] and "interrupted" not in errors, errors
        assert (die[2] if " " in die[2] else ranks.LOST) in ours[0]
    assert disk.load_state(out / "state.safetensors")[1]["step"] == kept
    go_on = ["train", "--out", "ppo", "--resume"]
    if n:
        process = start(n, body=str(body), apart=apart, runs=[go_on])
        assert process.wait(timeout=120) == 0, process.communicate()
    else:  # in this process
        monkeypatch.setitem(weights.PRESETS, "tiny", str(body))
        monkeypatch.setattr(train, "judge", judge)
        monkeypatch.chdir(out.parent)
        train.main(go_on[1:])
    assert {path.name for rank in "12" for path in (tmp_path / rank).glob("*")} <= {"ppo.died"}
    equal_states(alone / "ppo", out)


def test_an_evaluation_of_several_loses_at_most_one_round(tmp_path):
    """Each process keeps its answers until a round of 8 x seats is through: a night would be lost where they
    came together at the end alone, and a hole would be left where the first one's count went on without
    them."""
    asked = [*ASKED, "--limit", "24", "--json", str(tmp_path / "cut.json")]
    process = start(2, body="", die=[1, 19, "SIGKILL"], runs=[["eval", *asked]])
    errors = process.communicate(timeout=120)[1]
    assert process.returncode and ranks.LOST in errors, errors
    part = tmp_path / "cut.json.part"
    have = {row["number"]: row["seconds"] for row in rows(part)[1:]}
    assert set(range(16)) <= have.keys() <= {*range(16), *range(16, 24, 2)}  # and of the first process's own
    eval.main([*asked, "--resume"])
    eval.main([*asked[:-1], str(tmp_path / "whole.json")])
    cut, whole = (json.loads((tmp_path / name).read_text()) for name in ("cut.json", "whole.json"))
    assert not part.exists() and len(cut["questions"]) == 24
    assert cut["flags"].pop("resume") and not whole["flags"].pop("resume")
    nearly(cut, whole)
    assert all(cut["questions"][number]["seconds"] == seconds for number, seconds in have.items())  # kept


def test_the_signal_that_follows_a_loss_waits_until_all_is_saved(monkeypatch):
    """torchrun sends SIGTERM a tenth of a second after the loss: with a large body, during the forward pass
    before the saving, and every step since the last save would be lost."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    saved = []
    pause = Pause(lambda: saved.append("state"), lambda: not os.kill(os.getpid(), signal.SIGTERM))
    with (
        pytest.raises(OSError, match="Step 4 is lost, no more"),
        pause.on_signals(),
        saving_on_failure("out", {"step": 3}, pause),
    ):
        raise OSError(ranks.LOST)
    assert saved == ["state"]


def test_an_error_is_told_where_nobody_counts_any_more(monkeypatch):
    """The store is on the first machine: when that is lost, the others say so, without a traceback."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    server = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    store = torch.distributed.TCPStore("127.0.0.1", server.port, 2, wait_for_workers=False)
    monkeypatch.setattr(ranks, "stores", [store])
    assert ranks.first("end") and not ranks.first("end")
    del server
    assert ranks.first("end")


def test_what_is_divided_comes_back_in_order(monkeypatch):
    """An episode in another's place would be rewarded for the other's answer."""
    whole = [(question, sibling) for question in range(5) for sibling in range(2)]
    groups = [whole[i : i + 2] for i in range(0, 10, 2)]
    parts = [[x for group in groups[rank::3] for x in group] for rank in range(3)]
    monkeypatch.setattr(ranks, "everyone", lambda mine: parts)
    assert ranks.gathered(parts[0], 2) == whole
    monkeypatch.setattr(ranks, "everyone", lambda mine: [[0, 2], [1], []])
    assert ranks.gathered([0, 2]) == [0, 1, 2]
