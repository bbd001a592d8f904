"""What each process of a test of several does: commands one after the other, with rewards that differ.

    torchrun --nproc_per_node 2 tests/tools/together.py '{"body": DIR, "ids": FILE, "runs": [["train", ...]]}'

"die": [rank, step, signal or message] ends that process when it is to act in that step; "wait": the others
sleep then, so that they do not meet the loss in a collective. "apart": each runs in a directory of its own
below that one. Not a test: tests/test_ranks.py starts it.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import train
import weights
from cli import ranks, screen
from toy import texts

work = json.loads(sys.argv[1])
act = train.act


def judge(a, trajectories):
    """Rewards that differ from episode to episode; the first process keeps the ids."""
    if not ranks.rank() and work.get("ids"):
        with open(work["ids"], "a") as file:
            file.write(json.dumps([t.ids for t in trajectories]) + "\n")
    return torch.tensor([(sum(t.ids) % 97) / 97 for t in trajectories]).view(-1, a.group)


def dies(a, s, step, asked):
    rank, when, how = work.get("die", (None, None, None))
    if step == when and ranks.rank() == rank:
        Path(f"{a.out}.died").touch()
        if how not in signal.Signals.__members__:
            raise OSError(how)
        os.kill(os.getpid(), signal.Signals[how])
    elif step == when and work.get("wait"):
        time.sleep(60)
    return act(a, s, step, asked)


def main():
    if "apart" in work:  # as on machines without a common disk
        home = Path(work["apart"], os.environ.get("RANK", "0"))
        home.mkdir(exist_ok=True)
        os.chdir(home)
    for command, *argv in work["runs"]:
        importlib.import_module(command).main(argv)


weights.PRESETS["tiny"] = work["body"]
texts.audit.__defaults__ = (4, 0)
train.judge, train.act = judge, dies
if __name__ == "__main__":
    screen.run(main)
