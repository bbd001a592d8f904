"""The soak's own judgement, and a short one."""

import pytest
import torch

import weights
from cli.disk import Rows
from engine import Engine, Seat
from model import POLICY
from tokenizer import Tokenizer

from .endurance import busy, slope, verdict


def test_a_leak_is_told_from_noise():
    """A slope without its error calls every run a leak, or none."""
    flat = [[i, 10**9 + (i * 7919) % 4096, 9, 3] for i in range(1, 41)]
    assert verdict(flat)[0] == [] and "resident bytes" in verdict(flat)[1]
    assert "resident bytes" in verdict([[i, 10**9 + 5000 * i, 9, 3] for i, *_ in flat])[0][0]
    assert "open files" in verdict([[i, y, 9 + i, 3] for i, y, *_ in flat])[0][0]
    assert "threads" in verdict([[i, y, 9, i // 2] for i, y, *_ in flat])[0][0]


@pytest.mark.parametrize("name, n", [("steps", 8), ("evaluations", 8), ("resumes", 8)])
def test_a_few_repetitions_hold_on_to_no_file_and_no_thread(bench, tmp_path, name, n):
    """One open log a run, and a night of evaluations ends at the limit of open files; one seat or page a step
    that is not given back, and the engine waits for ever."""
    wrong, told = slope(bench.nursery, name, n, tmp_path / name)
    assert "open files" in told, wrong
    assert all(fault.startswith("resident bytes") for fault in wrong), wrong


def test_a_seat_that_is_not_given_back_is_seen(body):
    """The soak's own check: a page without an owner, or a seat without a turn, is no leak of memory."""
    tok = Tokenizer.load(body)
    engine = Engine({POLICY: (weights.load(body, torch.float32, "cpu"), tok)}, 2, 16, pages=4, page=8)
    pool = engine.pools[POLICY]
    assert busy(engine) == ""
    pool.cache.grow(1, 9)
    assert "2 pages" in busy(engine)
    pool.cache.drop(1)
    assert busy(engine) == ""
    pool.rows[0] = Seat(0, None, POLICY)
    assert "1 seats" in busy(engine)


def test_a_long_run_holds_a_few_figures_of_a_step(tmp_path):
    """A step's whole row and its kept episodes stayed in memory: 9 KB a step of the toy's, and more of
    others. The file has them all, and what a resumed run drops is still counted."""
    log = Rows(tmp_path / "log.jsonl", resume=True)
    log.add({"step": 1, "reward": 0.5, "text": "x" * 999})
    log.hold("reward", "absent")
    log.add({"step": 2, "reward": 0.7, "text": "y" * 999})
    assert list(log.rows.values()) == [{"reward": 0.5}, {"reward": 0.7}]
    again = Rows(tmp_path / "log.jsonl", resume=True)
    assert [len(row["text"]) for row in again.rows.values()] == [999, 999]
