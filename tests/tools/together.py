"""What each process of a test of several does: commands one after the other, with rewards that differ.

    torchrun --nproc_per_node 2 tests/tools/together.py '{"body": DIR, "ids": FILE, "runs": [["train", ...]]}'

"die": [rank, n, signal or message] ends that process when it is to act in step n of a training, or to answer
question n of an evaluation; "wait": the others sleep then, so that they do not meet the loss in a collective.
"apart": each runs in a directory of its own below that one. Not a test: tests/test_ranks.py starts it.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import eval
import train
import weights
from cli import ranks, screen
from toy import texts

work = json.loads(sys.argv[1])
act, kept = train.act, eval.kept


def judge(a, trajectories):
    """Rewards that differ from episode to episode; the first process keeps the ids."""
    if not ranks.rank() and work.get("ids"):
        with open(work["ids"], "a") as file:
            file.write(json.dumps([t.ids for t in trajectories]) + "\n")
    return torch.tensor([(sum(t.ids) % 97) / 97 for t in trajectories]).view(-1, a.group)


def dies(n: int, mark: str) -> None:
    rank, when, how = work.get("die", (None, None, None))
    if n == when and ranks.rank() == rank:
        Path(mark).touch()
        if how not in signal.Signals.__members__:
            raise OSError(how)
        os.kill(os.getpid(), signal.Signals[how])
    elif n == when and work.get("wait"):
        time.sleep(60)


def acts(a, s, step, asked):
    dies(step, f"{a.out}.died")
    return act(a, s, step, asked)


def answers(run, log, name, number, clock):
    dies(number, f"{log.path}.died")
    return (yield from kept(run, log, name, number, clock))


def main():
    if "apart" in work:  # as on machines without a common disk
        home = Path(work["apart"], os.environ.get("RANK", "0"))
        home.mkdir(exist_ok=True)
        os.chdir(home)
    for command, *argv in work["runs"]:
        importlib.import_module(command).main(argv)


weights.PRESETS["tiny"] = work["body"]
texts.audit.__defaults__ = (4, 0)
train.judge, train.act, eval.kept = judge, acts, answers
if __name__ == "__main__":
    screen.run(main)
