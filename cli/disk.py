"""The state of a training run: tensors and facts in one safetensors file, written whole or not at all.

Not a checkpoint format: what is in a state is its owner's affair, and nothing is unpickled.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the block: synced to disk and renamed to `path` at its
    end, deleted if the block fails. A crash at any moment leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors, on any device, and facts that JSON can hold. Raises OSError where the disk refuses."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata={"facts": json.dumps(facts)})
        except SafetensorError as e:
            raise OSError(f"{path} cannot be written ({e})") from None


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors, on the CPU, and the facts of `save_state`. Raises OSError or ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get("facts")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise ValueError(f"{path} is corrupt ({e})") from None
    if facts is None:
        raise ValueError(f"{path} is not the state of a run")
    return tensors, json.loads(facts)


def pack_optimizer(opt: torch.optim.Optimizer, prefix: str = "") -> dict[str, Tensor]:
    """The state of an optimiser that keeps only tensors (AdamW, Muon) as {prefix + "index.name": tensor}."""
    state = opt.state_dict()["state"]
    return {f"{prefix}{index}.{name}": t for index, entry in state.items() for name, t in entry.items()}


def unpack_optimizer(opt: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Undo `pack_optimizer`, ignoring names without the prefix. Tensors are copied to where the optimiser has
    them: moments beside their parameters, steps on the CPU unless AdamW is fused or capturable."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[name] = tensor.clone()
    opt.load_state_dict(opt.state_dict() | {"state": state})
