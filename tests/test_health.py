"""The monitors of a run that may collapse, and the line that says so."""

import pytest
import torch

import train
from evaluation.health import WINDOW, alarm, health, repetition
from rollout import Question, Trajectory


class Letters:
    """A tokenizer of characters."""

    eos = ()

    def decode(self, ids):
        return "".join(map(chr, ids))

    def encode(self, text):
        return list(map(ord, text))


def told(*runs, answer=None, logp=-0.5):
    t = Trajectory(Question("q", ("a",)), answer=answer)
    for text, mine in runs:
        t.add(Letters().encode(text), [logp] * len(text) if mine else None)
    return t


def test_repetition_is_of_thoughts_that_were_sampled():
    """Documents repeat words, and so do answers; a thought that says the same three words again and again is
    how a policy begins to degenerate, long before its reward falls."""
    loop, sane = "<think>go on and go on and go on and", "<think>first one thing then another</think>"
    assert repetition(["a b c a b c a b c"]) == pytest.approx(4 / 7) and repetition(["a b", ""]) == 0
    episodes = [told(("<think>x x x x x x x</think>", 0), (sane + "<answer>a a a a a a</answer>", 1))]
    assert health(episodes, torch.zeros(1, 1), Letters())["repetition"] == 0
    episodes.append(told((loop, 1), ("x x x x x x x", 0)))
    assert health(episodes, torch.zeros(2, 1), Letters())["repetition"] > 0.3


def test_figures_of_a_step():
    """The log-prob of correct episodes is what falls first (arXiv 2512.04220): of them alone, a token."""
    episodes = [told(("ab", 0), ("cdef"[: i + 1], 1), answer="x" if i else None, logp=-i) for i in range(4)]
    got = health(episodes, torch.tensor([[0.0, 0.0], [1.0, 0.5]]), Letters())
    assert (got["unanswered"], got["flat"], got["logp_correct"]) == (0.25, 0.5, -2)
    assert health(episodes, torch.zeros(2, 2), Letters())["logp_correct"] is None


GOOD = {"reward": 0.8, "unanswered": 0.1, "repetition": 0.05, "logp_correct": -0.3}


@pytest.mark.parametrize(
    "bad", [{"reward": 0.3}, {"unanswered": 0.5}, {"repetition": 0.4}, {"logp_correct": -0.9}]
)
def test_a_run_that_gets_worse_is_told_and_one_that_gets_better_is_not(bad):
    """A warning that never comes is useless, one that always comes is too."""
    begun, good = [GOOD | bad] * 3 * WINDOW, [GOOD] * 3 * WINDOW
    assert not alarm(good) and not alarm(begun + good) and not alarm([*good, GOOD | bad])
    assert not alarm([GOOD] * WINDOW + [GOOD | bad] * (WINDOW - 1))  # too young
    (value,) = bad.values()
    assert f"{value:.2f}" in alarm(good + [GOOD | bad] * WINDOW)
    assert not alarm(good + [GOOD | {"logp_correct": None}] * WINDOW)


def test_the_warning_is_one_line_once(capsys, monkeypatch):
    """A line a step is noise that nobody reads."""
    from cli.disk import Rows

    a = type("A", (), {"steps": 99, "show_every": 99})
    row = GOOD | {"em": 0.0, "searches": 0.0, "length": 1.0, "noise": 0.0, "ends": {}, "seconds_act": 0.1}
    row |= {"seconds_learn": 0.1, "tokens_per_second": 1.0, "seconds_left": 1.0}
    log = Rows(None)
    for step in range(4 * WINDOW):
        worse = {"unanswered": 0.9} if step >= 2 * WINDOW else {}
        train.tell(a, None, step + 1, row | worse, [], log)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(lines) == 1 and "without an answer 0.10" in lines[0]
