"""What a person at the terminal sees, and what a dashboard is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import screen, track

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train.py", "eval.py", "simulator.py", "look.py", "-m bench", "-m toy.make", "-m kernels")
COMMANDS += ("-m bench.ablate", "-m bench.growth", "-m kernels.tools.compile_check")


def typed(command, tmp_path):
    """What a terminal shows of a command on a machine where torch never comes."""
    pty = pytest.importorskip("pty")
    (tmp_path / "torch.py").write_text("raise SystemExit(3)")
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.Popen(
        [sys.executable, *command.split()], cwd=ROOT, env=env, stdout=theirs, stderr=theirs
    )
    assert done.wait(60) == 3
    os.close(theirs)
    return os.read(ours, 10_000).decode()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_speaks_before_torch_is_there(command, tmp_path):
    """Reading torch takes seconds, on a cold disk half a minute: a silent terminal looks hung."""
    assert typed(command, tmp_path) == "loading torch ...\r"


def test_a_file_holds_no_traces_of_the_live_line(capsys):
    """A log full of carriage returns and bars cannot be read, nor searched."""
    with screen.waiting("reading weights"), screen.bar("training", 3, "steps") as bar:
        screen.say("step 1")
        screen.move(bar, 1, "reward 0.5")
    out, err = capsys.readouterr()
    assert out == "step 1\n" and err == ""


ROW = {
    "reward": 0.5,
    "em": 0.25,
    "searches": 1.5,
    "sampled": 20.0,
    "length": 50.0,
    "clipped": 0.1,
    "kl": 0.01,
}
ROW |= {
    "gap": 1e-7,
    "ends": {"answer": 3, "turns": 1},
    "skipped_groups": 4,
    "simulator": {"useful": {"n": 3}},
}
ROW |= {"seconds_act": 1.0, "seconds_learn": 2.0}
FLAGS = {"questions": 16, "lr": 1e-5}
WANTED = {
    **{"train/reward": 0.5, "train/kl": 0.01, "train/completions/mean_length": 20.0, "train/em": 0.25},
    **{"train/tools/call_frequency": 1.5, "train/clip_ratio/region_mean": 0.1, "train/step_time": 3.0},
    **{"train/frac_reward_zero_std": 0.25, "train/completions/clipped_ratio": 0.25},
}


def test_the_real_tensorboard(tmp_path):
    """Figures that TensorBoard does not find, or finds twice after a run went on, are worse than none."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell = track.tracker("tensorboard", str(tmp_path), FLAGS, 0)
    for step in (1, 2, 3):
        tell(step, ROW)
    track.tracker("tensorboard", str(tmp_path), FLAGS, 2)(3, ROW | {"reward": 0.75})  # goes on after step 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/reward")] == [(1, 0.5), (2, 0.5), (3, 0.75)]
    seen = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert {k: seen[k] for k in WANTED} == pytest.approx(WANTED)


def test_the_real_wandb_offline(tmp_path):
    """The same, read back from the file that an offline run leaves for `wandb sync`."""
    pytest.importorskip("wandb", reason="pip install wandb")
    code = f"from cli import track; tell = track.tracker('wandb', {str(tmp_path)!r}, {FLAGS!r}, 0)\n"
    code += f"for step in (1, 2): tell(step, {ROW!r})"
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=300)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for name in WANTED:
        assert name.encode() in file.read_bytes(), name


def test_the_real_trackio(tmp_path):
    """The same, read back with Trackio's own command; a run that goes on keeps its curve, and another run in
    a directory of the same name begins one of its own."""
    pytest.importorskip("trackio", reason="pip install trackio")
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}

    def steps(*told, begun=0):
        code = f"from cli import track; tell = track.tracker('trackio', 'runs/mine', {FLAGS!r}, {begun})\n"
        code += f"for step in {told}: tell(step, {ROW!r} | {{'reward': step / 8}})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=300)

    def read(*asked):
        command = [sys.executable, "-m", "trackio.cli", *asked, "--project", "zerosearch", "--json"]
        return json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

    steps(1, 2)
    steps(3, 4, begun=2)
    assert read("list", "runs")["runs"] == ["mine"]
    for name, value in WANTED.items():
        curve = read("get", "metric", "--run", "mine", "--metric", name)["values"]
        wanted = [(n, n / 8 if name == "train/reward" else value) for n in (1, 2, 3, 4)]
        assert [(point["step"], point["value"]) for point in curve] == wanted
    steps(1, 2)
    assert len(read("list", "runs")["runs"]) == 2


def test_a_library_that_is_not_there(monkeypatch):
    """A run that dies after hours because a dashboard is missing: it must say so before it begins."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"--track trackio.*pip install trackio"):
        track.tracker("trackio", "out", FLAGS, 0)
