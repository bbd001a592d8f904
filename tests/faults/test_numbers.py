"""NaN and infinity, planted where they arise: a step is skipped and counted, and none is ever saved."""

import json

import pytest
import torch

import kernels
import train
import weights
from cli import disk, screen
from model import POLICY
from prepare import command, sft
from toy.task import Task

SHORT = "--steps 6 --questions 2 --group 2 --eval-questions 0 --sft-steps 0 --save-every 1 --show-every 9"
SHORT = [*SHORT.split(), *["--turn-tokens", "6", "--turns", "1", "--device", "cpu"]]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def tiny(body, monkeypatch):
    """The default body is a random one; rewards differ, and are bad in the steps of `train.judge.bad`."""
    steps = []

    def judge(a, trajectories):
        steps.append(0)
        rewards = torch.tensor([(sum(t.ids) % 97) / 97 for t in trajectories]).view(-1, a.group)
        rewards[0, 0] = judge.bad.get(len(steps), rewards[0, 0])
        return rewards

    judge.bad, judge.steps = {}, steps
    monkeypatch.setitem(weights.PRESETS, "tiny", str(body))
    monkeypatch.setattr(train, "judge", judge)
    monkeypatch.setattr(Task, "audit", lambda self, write: {})
    return judge


def state(out):
    """The saved adapter and step, after a look at all that is saved: there is no NaN in it."""
    tensors, facts = disk.load_state(out / "state.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    for file in out.rglob("*.json*"):
        assert "NaN" not in file.read_text() and "Infinity" not in file.read_text(), file
    for _, t in weights._read_safetensors(out / "policy/adapter_model.safetensors"):
        assert t.isfinite().all()
    return tensors["policy"], facts["step"]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def fails(capsys, *argv):
    """The one line of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        screen.run(lambda: train.main([str(x) for x in argv]))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("error: ") and "\n" not in err
    return err


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_reward_costs_its_step_and_no_more(tiny, tmp_path, bad):
    """One NaN ended a night's run; learnt, it would have ended the policy."""
    out, tiny.bad = tmp_path / "run", {2: bad, 3: bad, 5: bad}
    train.main(["--out", str(out), *SHORT])
    assert [row["skipped_updates"] for row in log(out)] == [0, 1, 1, 0, 1, 0]
    assert [row["reward"] is None for row in log(out)] == [False, True, True, False, True, False]
    assert state(out)[1] == 6 and disk.load_state(out / "state.safetensors")[1]["updates"] == 3


def test_three_bad_steps_in_a_row_end_the_run_with_the_last_good_state(tiny, tmp_path, capsys):
    """A run that can only skip would do so all night; what it had learnt before must be there."""
    out, tiny.bad = tmp_path / "run", {n: NAN for n in (2, 3, 4)}
    assert "three steps in a row were skipped" in fails(capsys, "--out", out, *SHORT)
    adapter, step = state(out)
    assert step == 3 and adapter.abs().max() > 0
    train.main(["--out", str(out), "--resume", "--lr", "0.001"])
    assert state(out)[1] == 6


@pytest.mark.parametrize("lr", ["1e18", "1e30"])
def test_a_learning_rate_that_explodes_leaves_the_last_good_state(tmp_path, capsys, lr):
    """The step that overflows is finite itself: what it makes of the policy shows only in the next one, and
    must not have replaced the last good state by then."""
    out = tmp_path / "run"
    error = fails(capsys, "--out", out, *SHORT, "--lr", lr)
    assert "finite" in error and "--resume" in error
    assert "--lr must be at most" in fails(capsys, "--out", tmp_path / "b", *SHORT, "--lr", "1e39")
    adapter, step = state(out)
    assert step == 0 and adapter.abs().max() < 10
    train.main(["--out", str(out), "--resume", "--lr", "0.001"])
    assert state(out)[1] == 6


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_logits_that_are_not_finite_end_the_run_in_one_line(tmp_path, capsys, monkeypatch, bad):
    """A policy whose logits are NaN samples one word for ever, and calls it an answer. No skipping helps: the
    same weights give the same logits, so the run ends at once, with the steps before."""
    out, sample = tmp_path / "run", kernels.sample

    def spoilt(*args):
        ids, logp = sample(*args)
        return ids, torch.full_like(logp, bad) if len(train.judge.steps) == 2 else logp

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "sample", spoilt)
        assert "logits that are not finite" in fails(capsys, "--out", out, *SHORT)
    assert state(out)[1] == 2
    train.main(["--out", str(out), "--resume"])
    assert state(out)[1] == 6


@pytest.mark.parametrize("bad", [NAN, INF])
def test_an_adapter_with_nan_on_disk_is_refused(body, tmp_path, bad):
    """Its first episode would be noise, and its first gradient NaN."""
    model = weights.load(body)
    model.add_role(POLICY, 2)
    weights.save_adapter(model, POLICY, tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = bad
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        weights.load_adapter(model, POLICY, tmp_path)


@pytest.mark.parametrize("config", [{"lora_alpha": 1e308}, {"r": 10**9}, {"r": 3}, {"lora_alpha": NAN}])
def test_an_adapters_config_is_held_against_its_matrices(body, tmp_path, config):
    """A scale that torch cannot hold was a traceback in the first episode; a huge rank, a full memory."""
    model = weights.load(body)
    model.add_role(POLICY, 2)
    weights.save_adapter(model, POLICY, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ValueError, match=r"adapter_config.json says"):
        weights.load_adapter(model, POLICY, tmp_path)


@pytest.mark.parametrize("bad, ends", [((2, 3, 5), False), ((3, 4, 5), True)])
def test_fine_tuning_skips_bad_steps_too(tmp_path, monkeypatch, bad, ends):
    """Its gradient was clipped and applied without a look: one NaN, and a NaN adapter was saved."""
    row = {"query": "home Balan", "answer": "Osham", "documents": "Doc 1: Balan lives in Osham."}
    rows = [row | {"question": f"home {i}?", "quality": ("useful", "noisy")[i % 2]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    backward, calls = sft.backward, []

    def spoilt(model, role, *args):
        calls.append(1)
        loss = backward(model, role, *args)
        if len(calls) in bad:
            model.adapter(role).grad[0] = NAN
        return loss

    monkeypatch.setattr(sft, "backward", spoilt)
    monkeypatch.setattr(command, "audited", lambda *a: {})
    argv = f"sft --sim tiny --rows {tmp_path}/rows.jsonl --steps 6 --every 1 --tokens 64 --held 2".split()
    out = tmp_path / "out"
    if ends:
        with pytest.raises(ValueError, match="steps 3 to 5 were skipped"):
            command.main([*argv, "--out", str(out)])
    else:
        command.main([*argv, "--out", str(out)])
    for _, t in weights._read_safetensors(out / "adapter_model.safetensors"):
        assert t.isfinite().all()
