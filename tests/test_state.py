"""The state of a training run on disk: whole or not at all, and an optimiser that goes on."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cli.disk import Rows, load_state, pack_optimizer, save_state, unpack_optimizer

MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
}


def steps(params, opt, seed: int, n: int = 3) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=rng)
        opt.step()


@pytest.mark.parametrize("maker", MAKERS)
def test_an_optimiser_goes_on_as_if_it_had_never_stopped(tmp_path, maker):
    """Moments or a step count that are lost, or come back as another type, change every later update."""
    make = MAKERS[maker]
    params = [torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(3, 2))]
    opt = make(params)
    steps(params, opt, 0)
    save_state(tmp_path / "s", pack_optimizer(opt, "a.") | {"b.0.exp_avg": torch.zeros(1)}, {"step": 3})
    tensors, facts = load_state(tmp_path / "s")
    assert facts == {"step": 3}
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(copies)
    unpack_optimizer(other, tensors, "a.")
    for i, (p, q) in enumerate(zip(params, copies)):
        assert opt.state[p].keys() == other.state[q].keys()
        for name, t in opt.state[p].items():
            u = other.state[q][name]
            assert (u.dtype, u.device, u.shape) == (t.dtype, t.device, t.shape) and torch.equal(t, u)
            assert u.data_ptr() != tensors[f"a.{i}.{name}"].data_ptr()  # its own memory, not the mapped file
    steps(params, opt, 1)
    steps(copies, other, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


def test_a_new_optimiser_has_an_empty_state(tmp_path):
    """A run saved before its first step must resume as well."""
    params = [torch.nn.Parameter(torch.ones(2, 2))]
    save_state(tmp_path / "s", pack_optimizer(torch.optim.AdamW(params)), {})
    opt = torch.optim.AdamW(params)
    unpack_optimizer(opt, load_state(tmp_path / "s")[0])
    assert not opt.state


def test_views_scalars_and_types_come_back(tmp_path):
    """A transposed tensor has another order in memory; bf16 has no numpy type."""
    x = torch.arange(6.0).view(2, 3)
    given = {"t": x.T, "s": torch.tensor(7), "h": x.bfloat16(), "p": torch.nn.Parameter(x.clone())}
    save_state(tmp_path / "s", given, {"é": [1, None]})
    tensors, facts = load_state(tmp_path / "s")
    assert facts == {"é": [1, None]} and tensors.keys() == given.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in given.items())
    with safe_open(tmp_path / "s", framework="pt") as file:  # anybody can read it without running its code
        assert set(file.keys()) == given.keys()


def test_the_file_is_on_the_disk_before_it_takes_its_name_and_the_name_after(tmp_path, monkeypatch):
    """After a power cut the name must lead to a whole file: without fsync it may lead to an empty one."""
    done, sync, rename = [], os.fsync, os.replace

    def fsync(fd):
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        sync(fd)

    def replace(a, b):
        assert a.parent == b.parent
        done.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_state(tmp_path / "s", {"x": torch.ones(1)}, {})
    assert done == ["file", "rename", *(["folder"] if hasattr(os, "O_DIRECTORY") else [])]


def test_a_save_that_fails_leaves_the_old_state_and_nothing_else(tmp_path, monkeypatch):
    """A full disk must cost the new state, not the run."""
    save_state(tmp_path / "s", {"x": torch.ones(1)}, {"step": 1})

    def full(fd):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_state(tmp_path / "s", {"x": torch.zeros(1)}, {"step": 2})
    assert load_state(tmp_path / "s")[1] == {"step": 1} and os.listdir(tmp_path) == ["s"]
    with pytest.raises(OSError, match="No such file"):
        save_state(tmp_path / "absent" / "s", {"x": torch.ones(1)}, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path, bad):
    """A state with one NaN in it trains nothing ever after; and `NaN` in a log is not JSON."""
    save_state(tmp_path / "s", {"x": torch.ones(1)}, {"step": 1, "best": bad})
    with pytest.raises(ValueError, match="its y holds NaN or infinity"):
        save_state(tmp_path / "s", {"x": torch.zeros(1), "y": torch.tensor([0.0, bad])}, {"step": 2})
    assert load_state(tmp_path / "s")[1] == {"step": 1, "best": None} and os.listdir(tmp_path) == ["s"]
    rows = Rows(tmp_path / "log.jsonl")
    rows.add({"reward": bad, "ends": {"answer": (1, -bad)}})
    wanted = {"reward": None, "ends": {"answer": [1, None]}}
    assert list(rows.rows.values()) == [json.loads((tmp_path / "log.jsonl").read_text())] == [wanted]


def test_a_file_that_is_no_state_is_one_clear_line(tmp_path):
    """A truncated file, somebody's weights, or none: an error for the command line, not a traceback."""
    path = tmp_path / "s"
    with pytest.raises(OSError):
        load_state(path)
    save_state(path, {"x": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="corrupt"):
        load_state(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not the state of a run"):
        load_state(path)
