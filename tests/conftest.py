"""Shared by all tests. Kernel tests run on the GPU if there is one, else under the interpreter.

One process cannot both interpret and compile: test_compile_check.py compiles in subprocesses.
"""

import importlib
import json
import os
import signal
import socket

import pytest
import torch

from cli.screen import STOPS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
for sig in STOPS:  # in the background, or under nohup, some are ignored, and so by the runs of the tests
    signal.signal(sig, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine with a GPU every kernel test is a test of the GPU: `-m gpu` finds them all."""
    for item in items:
        if torch.cuda.is_available() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors. Skips them where triton is not installed (macOS, Windows)."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_port() -> int:
    """A port of this machine that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def random_body(path, config, *init):
    """Write a random body with the toy world's tokenizer; config: its config.json, without a vocabulary."""
    from model import Config, Model
    from toy.make import write_tokenizer
    from weights import save_model

    write_tokenizer(path)
    vocab = json.loads((path / "tokenizer.json").read_text())
    size = len(vocab["model"]["vocab"]) + len(vocab["added_tokens"])
    save_model(Model(Config.from_hf(config | {"vocab_size": size})).init(*init), path)
    return path


def two_roles(config):
    """A random body whose policy and simulator differ."""
    from model import POLICY, SIMULATOR, Model

    model = Model(config).init(0, std=0.3)
    for role in (POLICY, SIMULATOR):
        model.add_role(role, rank=4, alpha=8)
        g = torch.Generator().manual_seed(role)
        model.adapter(role).data += torch.randn(model.adapter(role).shape, generator=g) * 0.05
    return model


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A random body of the toy's family: the folder of its checkpoint."""
    from toy.make import BODY

    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    return random_body(tmp_path_factory.mktemp("tiny"), BODY | small, 0, 0.1)


@pytest.fixture
def pretend_to_be(device):
    """The blocks chosen for another GPU, by its name; skips where this one has not the memory for them."""
    from kernels.launch import TARGETS, pretend, target

    def enter(name: str):
        if device == "cuda" and TARGETS[name].shared > target().shared:
            pytest.skip(f"the blocks for {name} do not fit this GPU")
        return pretend(TARGETS[name])

    return enter


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def program_order(request, device):
    """The test runs once in each order of the programs of a launch (a GPU has its own)."""
    if device == "cuda":
        if request.param != "forward":
            pytest.skip("a GPU chooses the order itself")
        yield
        return
    from kernels.tools import interpreter

    with interpreter.program_order(request.param):
        yield


@pytest.fixture
def filled_with_nan():
    """torch.empty gives NaN, so that an output that no program wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["all it can", "fp32", "nothing"])
def packable(request, monkeypatch):
    """Types of matrices that can be packed: those of this CPU and torch; fp32 alone, as on an x86 CPU without
    AVX-512; none, as in builds of torch without oneDNN.
    """
    file = importlib.import_module("kernels.packed_linear")  # the package has a function of that name
    can, some = file.can_pack, {"fp32": {torch.float32}, "nothing": set()}.get(request.param)
    monkeypatch.setattr(file, "can_pack", lambda dtype: can(dtype) and (some is None or dtype in some))
