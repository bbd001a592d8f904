"""A policy that writes its own documents: no simulator, and nothing of them is learnt."""

import json

import pytest

import train
from cli import flags, screen
from cli.setting import load
from rollout import Limits, Query, Question, Sampled, episode
from tasks import kind


class Letters:
    """A tokenizer of characters; 0 ends a turn."""

    eos = (0,)

    def decode(self, ids):
        return "".join(map(chr, ids))

    def encode(self, text):
        return list(map(ord, text))

    def chat(self, messages):
        return self.encode(messages[-1]["content"])


def played(script, limits=Limits()):  # noqa: B008
    """An episode in which the model says what the script says; the trajectory, and the turns it asked for."""
    run, turns, value = episode(Question("q", ("a",)), None, Letters(), limits), [], None
    lines = iter(script)
    while True:
        try:
            turns.append(run.send(value))
        except StopIteration as end:
            return end.value, turns
        text, end = next(lines)
        ids = Letters().encode(text)[: turns[-1].limit]
        value = Sampled(ids, [-0.5] * len(ids), end)


def test_own_documents_are_sampled_and_masked():
    """Documents that are trained on teach the policy to please itself; tokens that are fed twice, or never,
    make its log-probs those of another text."""
    asked, answered, code = "<search>who</search>", "<answer>a</answer>", Letters().encode
    for said, end, text in [
        ("Doc 1: a</information>", "stop", "Doc 1: a"),
        ("Doc 1", "limit", "Doc 1"),
        ("\0", "eos", "\0"),
    ]:
        t, turns = played([(asked, "stop"), (said, end), (answered, "stop")])
        first, own, last = turns
        ((query, documents),) = t.searches
        assert (t.answer, query.text, documents.text) == ("a", "who", text)
        assert "".join(chr(i) for i, m in zip(t.ids, t.mask) if m) == asked + answered
        assert all(logp == 0 for logp, m in zip(t.logps, t.mask) if not m)
        assert own.stops == ("</information>",) and own.context is first.context is last.context
        assert own.address != first.address and own.role == first.role
        whole = first.ids + code(asked) + own.ids + code(said) + last.ids + code(answered)
        assert whole == t.ids
        assert Letters().decode(own.ids + code(said) + last.ids).count("</information>") == 1


def test_own_documents_keep_to_the_limits():
    """An episode longer than its seat ends the run."""
    t, turns = played(
        [("<search>q</search>", "stop"), ("x" * 99, "limit")] * 9 + [("<answer>a</answer>", "stop")],
        Limits(prompt=9999, episode=2000, turn=60, observation=50, turns=9),
    )
    assert len(t.ids) <= 2000 and all(turn.limit <= 60 for turn in turns) and len(t.searches) == 9
    t, turns = played(
        [("<search>q</search>", "stop"), ("<answer>a</answer>", "stop")], Limits(observation=30, turns=1)
    )
    assert len(turns) == 2 and t.searches[0][1].text == "" and t.answer == "a"  # no room: an empty block


def test_a_run_against_itself(tmp_path, capsys):
    """No simulator's body, words or seats: what remains of them would be loaded, tuned or asked."""
    out = tmp_path / "run"
    argv = ["--sim", "self", "--steps", "2", "--questions", "2", "--group", "3", "--eval-questions", "4"]
    argv += ["--algorithm", "reinforce++"]
    train.main([*argv, "--out", str(out)])
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert row["searches"] > 0 and row["simulator"] == {} and row["noise"] == 0 and row["gap"] < 1e-4
    train.main(["--out", str(out), "--resume"])
    a = flags.settle("train", {"sim": "self"})
    s = load(a, kind(a.task)(a))
    assert s.simulator is None and len(s.bodies) == 1 and a.sft_steps == 0
    for more in (["--sft-steps", "3"], ["--sim-adapter", "x"]):
        with pytest.raises(SystemExit):
            screen.run(lambda more=more: train.main([*argv, *more, "--out", str(tmp_path / "no")]))
        assert "has no simulator" in capsys.readouterr().err


def test_a_run_against_the_real_engine(tmp_path, capsys):
    """Training on the held-out world's facts would be cheating; without the curriculum's noise, an engine is
    not to be compared with a simulator."""
    a = flags.settle("train", {"sim": "real", "eval-questions": 9})
    task = kind(a.task)(a)
    asked = task.to_train()[0]
    assert a.sft_steps == 0
    for noise in (0.0, 1.0):
        search = task.practice(noise)
        for i, question in enumerate(q for q in asked[:40] if q.hops == 1):
            with pytest.raises(StopIteration) as found:
                next(search(Query(question.text.rstrip("?"), question, (0, 0, i, 0, 0))))
            assert (question.answers[0] in found.value.value.text, found.value.value.noisy) == (
                not noise,
                noise,
            )
    out = tmp_path / "run"
    argv = ["--steps", "2", "--questions", "2", "--group", "3", "--eval-questions", "4", "--noise-start", "1"]
    train.main([*argv, "--sim", "real", "--noise-end", "1", "--out", str(out)])
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert row["noise"] == 1 and row["searches"] > 0 and list(row["simulator"]) == ["noisy"]
    for more, what in (["--sft-steps", "3"], "has no simulator"), (["--data", "x.jsonl"], "--eval-search"):
        with pytest.raises(SystemExit):
            screen.run(lambda more=more: train.main(["--sim", "real", *more, "--out", str(tmp_path / "no")]))
        assert what in capsys.readouterr().err
