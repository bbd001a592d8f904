"""Runs that end early: whose directory it is, what is saved when, and what a run that goes on may change.

A random body in the toy task. Rewards are a function of the answer's text, so that every step learns.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import weights
from cli import disk, flags, screen
from model import Config, Model
from toy.task import Task
from weights import save_model

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    *("--steps", "4", "--questions", "2", "--group", "4", "--eval-questions", "0", "--sft-steps", "0"),
    *("--save-every", "9", "--show-every", "9", "--turn-tokens", "6", "--turns", "1", "--device", "cpu"),
]


def judge(a, trajectories):
    return torch.tensor([(sum(t.ids) % 97) / 97 for t in trajectories]).view(-1, a.group)


@pytest.fixture(autouse=True)
def tiny(body, monkeypatch):
    """The default body is the random one, and rewards differ from episode to episode."""
    monkeypatch.setitem(weights.PRESETS, "tiny", str(body))
    monkeypatch.setattr(train, "judge", judge)
    monkeypatch.setattr(Task, "audit", lambda self, write: {})  # slow, and tells nothing here


def run(*argv):
    train.main([str(x) for x in argv])


def fails(capsys, *argv):
    """The one line that a command prints when it exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        screen.run(lambda: run(*argv))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("error: ") and "\n" not in err, err
    return err


def steps_of(out):
    return disk.load_state(out / "state.safetensors")[1]["step"]


def adapter_of(out):
    return (out / "policy/adapter_model.safetensors").read_bytes()


def equal_ends(a, b):
    """Two runs ended in the same state: adapter, moments, figures."""
    (left, facts), (right, others) = (disk.load_state(out / "state.safetensors") for out in (a, b))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert adapter_of(a) == adapter_of(b) and "optimizer.0.exp_avg" in left
    assert facts["updates"] == others["updates"] == 4


@pytest.fixture(scope="module")
def whole(body, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights.PRESETS, "tiny", str(body))
        patch.setattr(train, "judge", judge)
        patch.setattr(Task, "audit", lambda self, write: {})
        run("--out", out, *SHORT)
    return out


# ------------------------------------------------------------------------------------------ whose directory


def test_two_runs_never_share_a_directory(tmp_path, capsys):
    """Two logs in one file belong to no run: the second is refused while the first holds the directory, also
    where it means to resume, and the directory of a finished run is refused without --resume."""
    out = tmp_path / "run"
    with disk.claimed(out, resume=False):
        assert "another run is writing" in fails(capsys, "--out", out, *SHORT)
        (out / "args.json").write_text(json.dumps({"settled": vars(flags.settle("train", {"steps": 4}))}))
        assert "another run is writing" in fails(capsys, "--out", out, "--resume")
    assert "already holds something" in fails(capsys, "--out", out, *SHORT)


def test_names_made_in_one_second_differ(tmp_path, monkeypatch):
    """Two runs begun together, without --out, must not meet."""
    monkeypatch.setattr("time.strftime", lambda layout: "now")
    names = [disk.free_name(str(tmp_path)) for _ in range(3)]
    assert len(set(names)) == 3 and all(Path(name).is_dir() for name in names)


def test_a_refused_run_leaves_no_directory(tmp_path, capsys):
    """Nothing half-written: an empty directory would be taken for a run."""
    out = tmp_path / "run"
    assert "GiB even with" in fails(capsys, "--out", out, *SHORT, "--memory", "0.003")
    assert not out.exists()
    assert "is a file" in fails(capsys, "--out", ROOT / "README.md", *SHORT)


# ------------------------------------------------------------------------------------------- what is saved


def at_step(n, error, monkeypatch, where="learn", late=False):
    """Raise an error in the n-th call of a verb, before (or after) it has done its work."""
    verb, calls = getattr(train, where), []

    def breaks(*args):
        calls.append(1)
        if len(calls) == n and not late:
            raise error
        out = verb(*args)
        if len(calls) == n:
            raise error
        return out

    monkeypatch.setattr(train, where, breaks)


@pytest.mark.parametrize("where", ["act", "learn"])
@pytest.mark.parametrize("error", [ValueError("not finite"), OSError("refused"), RuntimeError("bug")])
def test_any_error_keeps_the_steps_that_are_whole(whole, tmp_path, capsys, monkeypatch, where, error):
    """An error at step 4 of a night's run left the state of step 0: what is whole is saved before the run
    ends, the advice is true, and the run that goes on ends like one that was never broken."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(3, error, patch, where)
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError, match="bug"):
                run("--out", out, *SHORT)
            told = capsys.readouterr().err
        else:
            told = fails(capsys, "--out", out, *SHORT)
    assert "Step 3 is lost, no more" in told and f"--out {out} --resume" in told
    assert steps_of(out) == 2
    run("--out", out, "--resume")
    equal_ends(out, whole)


def test_a_state_between_two_steps_is_none(whole, tmp_path, capsys, monkeypatch):
    """An adapter that has moved since the last whole step is not that step's: it must not be saved as if it
    were, and the advice says so."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(3, ValueError("late"), patch, late=True)
        assert "and those since the last save" in fails(capsys, "--out", out, *SHORT)
    assert steps_of(out) == 0
    run("--out", out, "--resume")
    equal_ends(out, whole)


def test_a_second_ctrl_c_loses_only_its_step(whole, tmp_path, monkeypatch):
    """Whoever presses Ctrl-C twice wants to stop at once, not to lose the night."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(3, KeyboardInterrupt(), patch, "act")
        with pytest.raises(KeyboardInterrupt):
            run("--out", out, *SHORT)
    assert steps_of(out) == 2
    run("--out", out, "--resume")
    equal_ends(out, whole)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(whole, tmp_path, capsys, monkeypatch, sig):
    """A machine that is taken away sends SIGTERM: it is Ctrl-C by another name. The handlers are put back."""
    out, tell, calls = tmp_path / "run", train.tell, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), sig)
        tell(*args)

    before = signal.getsignal(sig)
    with monkeypatch.context() as patch:
        patch.setattr(train, "tell", stop)
        with pytest.raises(SystemExit) as end:
            run("--out", out, *SHORT)
    assert end.value.code == 130 and signal.getsignal(sig) is before
    assert steps_of(out) == 2 and "--resume" in capsys.readouterr().out
    run("--out", out, "--resume")
    equal_ends(out, whole)


def test_a_signal_saves_at_once_what_is_whole(whole, tmp_path, monkeypatch):
    """A scheduler sends SIGTERM, waits less than a step, and kills: the steps before must be on disk."""
    out, act, calls = tmp_path / "run", train.act, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append(steps_of(out))
        return act(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "act", stop)
        with pytest.raises(SystemExit):
            run("--out", out, *SHORT)
    assert calls[3] == 2 and steps_of(out) == 3
    run("--out", out, "--resume")
    equal_ends(out, whole)


def test_a_signal_while_a_failure_is_saved_waits(whole, tmp_path, monkeypatch):
    """A machine that is taken away just then would have the same files written by two saves, one inside the
    other: half of each."""
    out, save, saves = tmp_path / "run", disk.save_state, []

    def slow(path, tensors, facts):
        saves.append(facts["step"])
        if saves == [0, 2]:
            os.kill(os.getpid(), signal.SIGTERM)
        save(path, tensors, facts)

    with monkeypatch.context() as patch:
        at_step(3, ValueError("not finite"), patch)
        patch.setattr(disk, "save_state", slow)
        with pytest.raises(ValueError, match="no more"):
            run("--out", out, *SHORT)
    assert saves == [0, 2]
    run("--out", out, "--resume")
    equal_ends(out, whole)


def test_sigterm_ends_a_command_in_one_line():
    """Before the loop there is nothing to save, but a killed command still says so and exits with 130."""
    code = (
        "from cli import screen; import time; screen.run(lambda: (print('up', flush=True), time.sleep(60)))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=60)[1] == "interrupted\n" and child.returncode == 130


def test_a_full_disk_is_one_line_and_the_old_state_stays(whole, tmp_path, capsys, monkeypatch):
    """A half-written state would be worse than none."""
    out = tmp_path / "run"

    def full(path, data):
        plain(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        at_step(3, OSError("no space for the log"), patch, "act")
        plain = Path.write_bytes
        patch.setattr(Path, "write_bytes", lambda *a: (full if steps_taken(out) else plain)(*a))
        told = fails(capsys, "--out", out, *SHORT)
    assert "as this one failed" in told and "Errno 28" in told and steps_of(out) == 0
    assert not list(out.rglob("*.tmp"))
    run("--out", out, "--resume")
    equal_ends(out, whole)


def steps_taken(out):
    log = out / "log.jsonl"
    return log.exists() and len(log.read_text().splitlines())


def test_the_adapter_is_never_behind_the_state(whole, tmp_path, monkeypatch):
    """Killed between its two writes, a run that says "done" left an adapter of ten steps ago for ever: it is
    written first, and again at the end."""
    out, saves = tmp_path / "run", []

    def dies(path, tensors, facts):
        saves.append(facts["step"])
        if facts["step"] == 4:
            raise KeyboardInterrupt
        save(path, tensors, facts)

    save = disk.save_state
    with monkeypatch.context() as patch:
        patch.setattr(disk, "save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            run("--out", out, *SHORT)
    assert adapter_of(out) == adapter_of(whole)
    run("--out", out, "--resume")
    (out / "policy/adapter_model.safetensors").write_bytes(b"torn")
    run("--out", out, "--resume")  # nothing is left to do but the end
    equal_ends(out, whole)


# ---------------------------------------------------------------------------------- what may change, and not


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A run that was stopped after two of its steps."""
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        at_step(3, KeyboardInterrupt(), patch, "act")
        with pytest.raises(KeyboardInterrupt):
            run("--out", out, *SHORT)
    return out


def test_the_time_of_a_run_is_that_of_all_its_parts(cut):
    """A run that was cut at night and resumed in the morning took both."""
    tensors, facts = disk.load_state(cut / "state.safetensors")
    assert facts["seconds"] > 0
    disk.save_state(cut / "state.safetensors", tensors, facts | {"seconds": 1000.0})
    run("--out", cut, "--resume")
    assert disk.load_state(cut / "state.safetensors")[1]["seconds"] > 1000
    assert json.loads((cut / "result.json").read_text())["seconds"] > 1000


def test_defaults_of_another_day_change_nothing(cut, whole, monkeypatch):
    """Flags that were left to their defaults were settled anew on --resume: another device, or a newer
    version with another default, went on with another experiment in silence."""
    usual = {"grad-clip": 0.9, "kl": 1.0, "alpha": 1.0, "observation-tokens": 9, "seat-tokens": 99}
    for f in (f for group in flags.TRAIN.values() for f in group):
        if f.name in usual:
            monkeypatch.setitem(vars(f), "default", usual[f.name])
            monkeypatch.setitem(vars(f), "cpu", usual[f.name])
    monkeypatch.setattr(flags, "machine", lambda device, dtype: ("cpu", "bf16"))
    run("--out", cut, "--resume")
    equal_ends(cut, whole)


def test_only_a_short_list_may_change_and_every_change_is_told(cut, capsys):
    """A run resumed with other flags would be two runs of one name; what may differ is told and kept."""
    for flag in (["--clip-low", "0.5"], ["--steps", "9"], ["--seed", "1"], ["--bits", "8"], ["--turns", "2"]):
        assert "other arguments" in fails(capsys, "--out", cut, "--resume", *flag), flag
    run("--out", cut, "--resume", "--lr", "0.5", "--save-every", "1", "--group", "4")
    assert "--lr 0.002 -> 0.5" in (told := capsys.readouterr().out) and "--save-every 9 -> 1" in told
    kept = json.loads((cut / "args.json").read_text())
    assert kept["changes"] == [{"lr": [0.002, 0.5], "save-every": [9, 1]}]
    assert kept["settled"]["lr"] == 0.5 and kept["settled"]["group"] == 4


def test_memory_is_planned_anew_where_it_is_given(cut, capsys):
    """--memory was accepted on --resume and ignored; without it a run keeps its plan."""
    old = json.loads((cut / "args.json").read_text())["settled"]
    run("--out", cut, "--resume", "--memory", "0.003")
    assert "plan for 0.0 GiB" in capsys.readouterr().out
    new = json.loads((cut / "args.json").read_text())["settled"]
    assert new["seats"] < old["seats"] and new["memory"] == 0.003


def test_other_questions_are_refused(body, tmp_path, capsys, monkeypatch):
    """One line added to the file reshuffles all questions: the second half would train on those of the first,
    and nothing would say so. The words of the prompts count as well."""
    data, words, out = tmp_path / "q.jsonl", tmp_path / "words.json", tmp_path / "run"
    lines = [json.dumps({"question": f"home {i}", "answer": "Lima"}) + "\n" for i in range(9)]
    data.write_text("".join(lines))
    words.write_text(json.dumps({"prompt": "{question}", "notice": "!"}))
    argv = ["--out", out, *SHORT, "--data", data, "--policy", body, "--policy-prompt", words]
    argv += ["--prompt-tokens", "60", "--episode-tokens", "200", "--observation-tokens", "40"]
    argv += ["--sim-tokens", "8", "--seat-tokens", "512", "--sim-prompt", tmp_path / "sim.json"]
    sim = {"system": "", "useful": "U {query}", "noisy": "N {query}"}
    (tmp_path / "sim.json").write_text(json.dumps(sim))
    with monkeypatch.context() as patch:
        at_step(2, KeyboardInterrupt(), patch, "act")
        with pytest.raises(KeyboardInterrupt):
            run(*argv)
    data.write_text("".join([*lines, lines[0]]))
    assert "the questions are not those" in fails(capsys, "--out", out, "--resume")
    data.write_text("".join(lines))
    (tmp_path / "sim.json").write_text(json.dumps(sim | {"useful": "Useful {query}"}))
    assert "simulator's words" in fails(capsys, "--out", out, "--resume")
    (tmp_path / "sim.json").write_text(json.dumps(sim))
    words.write_text(json.dumps({"prompt": "? {question}", "notice": "!"}))
    assert "policy's words" in fails(capsys, "--out", out, "--resume")
    words.write_text(json.dumps({"prompt": "{question}", "notice": "!"}))
    run("--out", out, "--resume")
    assert steps_of(out) == 4


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    """torch's own traceback for a mistyped device is a page long."""
    for device in ("cuad", "meta", "cuda:99" if torch.cuda.is_available() else "cuda"):
        assert f"--device {device}" in fails(capsys, "--out", tmp_path / "run", "--device", device)


def test_others_can_resolve_the_base_of_an_adapter(whole, tmp_path):
    """PEFT's AutoPeftModel looks for the base by the name in the adapter's config: "3b" is nobody's name."""
    config = json.loads((whole / "policy/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
    assert weights.base_name("3b") == "Qwen/Qwen2.5-3B-Instruct" and weights.base_name("me/mine") == "me/mine"
    assert weights.base_name(os.path.relpath(tmp_path)) == str(tmp_path)


def test_a_lock_dies_with_its_process(tmp_path):
    """A run that was killed must not keep its directory: whoever resumes it is not asked to delete a file."""
    out = tmp_path / "run"
    code = f"""import time; from pathlib import Path; from cli import disk; out = Path({str(out)!r})
with disk.claimed(out, False):
    (out / "x").touch(); print("up", flush=True); time.sleep(60)"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "up\n"
    with pytest.raises(ValueError, match="another run"), disk.claimed(out, resume=True):
        pass
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with disk.claimed(out, resume=True):
                return
        except ValueError:
            time.sleep(0.05)
    raise AssertionError("the lock outlived its process")


def test_ppo_goes_on_as_if_it_had_not_been_cut(tmp_path, monkeypatch):
    """Half a critic in the saved state (no vector, no moments) is a critic that forgets at every resume."""
    ppo, cut, learn = [*SHORT, "--algorithm", "ppo", "--lr", "1e-3"], tmp_path / "cut", train.learn
    run("--out", tmp_path / "whole", *ppo)

    def dies(a, s, step, *more):
        if step == 2:
            raise KeyboardInterrupt
        return learn(a, s, step, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learn", dies)
        run("--out", cut, *ppo)
    assert steps_of(cut) == 2
    run("--out", cut, "--resume")
    equal_ends(tmp_path / "whole", cut)
    state = disk.load_state(cut / "state.safetensors")[0]
    assert {"critic", "value", "optimizer.1.exp_avg", "optimizer.2.exp_avg"} <= state.keys()
    assert state["value"].abs().max() > 0 and state["critic"].numel() == state["policy"].numel()
    rows = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    assert all(row["value_loss"] > 0 and row["critic_norm"] > 0 and not row["skipped_groups"] for row in rows)


def test_a_directory_that_was_removed_is_not_owned(tmp_path, monkeypatch):
    """A run that leaves its directory empty removes it: whoever has opened it meanwhile would lock nothing,
    while a third run makes it again and owns it too."""
    out, opened = tmp_path / "run", os.open

    def late(path, flags):
        handle = opened(path, flags)
        if len(calls) == 0 and path == out:
            calls.append(1)
            out.rmdir()  # the first owner leaves between our opening and our locking
        return handle

    calls = []
    monkeypatch.setattr(os, "open", late)
    with disk.claimed(out, resume=False):
        monkeypatch.undo()
        assert calls and out.is_dir()
        with pytest.raises(ValueError, match="another run"), disk.claimed(out, resume=False):
            pass


def test_a_kill_before_the_first_file_is_whole_leaves_no_dead_directory(tmp_path):
    """Half of args.json is nothing to resume, and must not be in the way of a new run either."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "args.json.tmp").write_text("{")
    with disk.claimed(out, resume=False):
        pass


def test_another_body_is_refused(cut, body, tmp_path, capsys, monkeypatch):
    """Other weights under the same name would go on as if they had learnt."""
    other = tmp_path / "other"
    shutil.copytree(body, other)
    save_model(Model(Config.from_hf(json.loads((other / "config.json").read_text()))).init(7, 0.1), other)
    monkeypatch.setitem(weights.PRESETS, "tiny", str(other))
    assert "the bodies are not those" in fails(capsys, "--out", cut, "--resume")


def test_other_held_out_questions_are_refused(cut, capsys, monkeypatch):
    """Before and after would be scores of different questions."""
    plain = Task.to_train

    def other(self):
        questions, _, engine = plain(self)
        return questions, questions[:2], engine

    monkeypatch.setattr(Task, "to_train", other)
    assert "held-out questions" in fails(capsys, "--out", cut, "--resume")
