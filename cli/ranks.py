"""Several processes, on one machine or more: `torchrun --nproc_per_node 4 train.py ...`.

Each process holds the whole body, acts on every n-th question, and learns from every n-th trajectory.
Between the two all know all trajectories, so whatever a step decides is decided alike in all. The first
process writes and prints. Gradients go by NCCL between GPUs and by gloo between CPUs, objects by gloo; a
process that is alone is given back what it brings.

Not a launcher (torchrun is one), and not sharding: the body must fit each GPU.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist

Made = TypeVar("Made")
LOST = "another process of this run has ended, or torchrun was told to stop"
LOCAL = int(os.environ.get("LOCAL_RANK", 0))  # this process's number, and its GPU's, on its machine
stores: list[dist.Store] = []  # torchrun's own, which outlives each of us, unless its machine is lost


def start() -> None:
    """Join the other processes, if torchrun started this one. All but the first fall silent."""
    if not dist.is_torchelastic_launched() or stores:
        return
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(LOCAL % gpus)  # where they are too few, cli/flags.py says so
    store, number, size = next(dist.rendezvous("env://"))
    stores.append(store)
    how = {"backend": "cpu:gloo,cuda:nccl" if gpus else "gloo", "timeout": timedelta(hours=2)}
    dist.init_process_group(store=store, rank=number, world_size=size, **how)
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end)


def rank() -> int:
    """This process's number. The first one, 0, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first(what: str) -> bool:
    """Whether no process has asked this before: an error that all meet is told once, by whoever is alive (by
    each, where the machine that counts is lost)."""
    try:
        return world() == 1 or stores[0].add(what, 1) == 1
    except RuntimeError:
        return True


def part() -> slice:
    """This process's share of any sequence."""
    return slice(rank(), None, world())


def gathered(mine: Sequence, size: int = 1) -> list:
    """What the processes made of their `part()`s, in the order of the whole; each item became `size`."""
    groups = ([made[i : i + size] for i in range(0, len(made), size)] for made in everyone(mine))
    return [x for turn in zip_longest(*groups, fillvalue=()) for group in turn for x in group]


def everyone(mine: Made) -> list[Made]:
    """The objects of all processes, by rank."""
    out = [mine] * world()
    _together(dist.all_gather_object, out, mine)
    return out


def told(make: Callable[[], Made]) -> Made:
    """What the first process makes, in every process."""
    made = [make() if rank() == 0 else None]
    _together(dist.broadcast_object_list, made)
    return made[0]


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, which has the same bits in each."""
    for tensor in tensors:
        _together(dist.all_reduce, tensor)


def _together(collective: Callable, *args) -> None:
    try:
        if world() > 1:
            collective(*args)
    except RuntimeError as e:  # gloo and NCCL name sockets
        raise OSError(LOST) from e


def lost(*_) -> None:
    """How one of several processes takes SIGTERM, which torchrun sends when another has ended."""
    raise OSError(LOST)
