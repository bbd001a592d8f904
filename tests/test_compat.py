"""The authors' defects as switches: each does what it says, reaches the run, and is off by default."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import compat
import grpo
import train
from cli import flags
from cli.disk import load_state
from compat import DEFECTS
from model import POLICY, SIMULATOR
from rollout import Documents, Query, Question, Trajectory

CHEAP = [
    *("--steps", "2", "--questions", "3", "--group", "4", "--eval-questions", "0", "--sft-steps", "1"),
    *("--lr", "0.01", "--seed", "3", "--noise-start", "0.5", "--algorithm", "reinforce", "--kl", "0.5"),
]


class Letters:
    """A tokenizer of characters that reads "ab" as one token, 500; 0 ends a turn."""

    eos = (0,)

    def decode(self, ids):
        return "".join("ab" if i == 500 else chr(i) for i in ids)

    def encode(self, text):
        return [500 if c == "\1" else ord(c) for c in text.replace("ab", "\1")]


def told(*runs, answer=None):
    t = Trajectory(Question("q", ("gold",)), answer=answer)
    for text, mine in runs:
        t.add(list(map(ord, text)), [-0.5] * len(text) if mine else None)
    return t


def test_names_are_checked():
    """A defect that is mistyped and so left out makes the comparison a lie."""
    assert compat.chosen("") == set() and compat.chosen("zerosearch") == set(DEFECTS)
    assert compat.chosen("top-p,pairing") == {"top-p", "pairing"}
    with pytest.raises(ValueError, match="--compat topp is unknown"):
        flags.settle("train", {"compat": "topp"})


def test_a_leak_tells_the_answer_whatever_was_asked():
    """The cost of leaks is measured with a simulator that always leaks; noisy documents stay as they were."""

    def search(query):
        return Documents("Doc 1: right\nDoc 2: other", noisy=query.text == "noisy")
        yield

    texts = {}
    for asked in ("who", "noisy"):
        with pytest.raises(StopIteration) as found:
            next(compat.leaking(search)(Query(asked, Question("q", ("gold", "alias")))))
        texts[asked] = found.value.value.text
    assert texts == {"who": "Doc 1: who gold\nDoc 2: other", "noisy": "Doc 1: right\nDoc 2: other"}
    assert compat.chosen("leak") == {"leak"} and "leak" not in compat.chosen("zerosearch")
    assert compat.chosen("zerosearch,leak") == {*DEFECTS, "leak"}


def test_a_query_is_paired_with_another_row():
    """Defect 1: documents are written for the question of another row, while the episode keeps its own."""
    asked, seen = [(10 + i, Question(f"q{i}", ("a",))) for i in range(5)], []

    def search(query):
        seen.append(query)
        return Documents("d")
        yield

    wrong = compat.mispaired(search, asked, 4)
    for i, (number, question) in enumerate(asked):
        for sibling in range(4):
            for _ in wrong(Query("w", question, (0, 7, number, sibling, 1))):
                raise AssertionError("no turn is asked for")
            row = int((4 * i + sibling) * 0.81)
            assert seen[-1].question is asked[row // 4][1] and seen[-1].text == "w"
    assert seen[-1].question.text == "q3" and seen[0].question.text == "q0"


def test_the_prompts_example_is_graded():
    """Defect 3: an episode that never answered gets the score of the example in its prompt."""
    t = told(("say <answer> Rome </answer>", 0), ("I think", 1), ("<answer> and </answer>", 0))
    assert compat.example(t, Letters()) == "and" and compat.example(told(("x", 1)), Letters()) is None


def test_text_is_encoded_again():
    """Defect 5: trained ids are not the sampled ones, the end of a turn is gone, log-probs are unknown; given
    tokens stay as they were, unless documents are trained on as well (defect 8); prompts never are."""
    t = told(("ab", 0), ("ab\0", 1), ("ab", 0), ("c", 1), answer="x")
    ab = [97, 98]
    for defects, ids, mask in [
        ({"retoken"}, [*ab, 500, *ab, 99], [0, 0, 1, 0, 0, 1]),
        ({"documents"}, [*ab, *ab, 0, *ab, 99], [0, 0, 1, 1, 1, 1, 1, 1]),
        ({"top-p"}, [*ab, *ab, 0, *ab, 99], [0, 0, 1, 1, 1, 0, 0, 1]),
    ]:
        new = compat.retold(t, Letters(), defects)
        assert (new.ids, new.mask, new.answer) == (ids, mask, "x")
        assert [math.isnan(x) for x in new.logps] == [bool(m) for m in mask]
    assert t.ids == [*ab, *ab, 0, *ab, 99] and not any(map(math.isnan, t.logps))


def test_the_tail_is_cut_for_the_policy_alone():
    """Defect 7: what sampling cannot give, training thinks it could have. The simulator samples as always."""
    p = torch.tensor([[0.02, 0.6, 0.3, 0.05, 0.03]]).expand(2, -1)
    kept = compat.nucleus(p.log(), torch.tensor([POLICY, SIMULATOR])).softmax(-1)
    assert (kept > 0).tolist() == [[False, True, True, True, False], [True] * 5]
    assert (compat.nucleus(p.log(), torch.tensor([1, 1]), 0.5).softmax(-1) > 0).sum() == 2


def test_unknown_log_probs_become_those_before_the_update(monkeypatch):
    """NaN in the old log-probs would make the ratio, and then the adapter, NaN."""
    monkeypatch.setattr(grpo, "token_logps", lambda m, b, role, *_: (torch.arange(3.0), None))
    (b,) = grpo.make_batches([told(("p", 0), ("abc", 1))], [1.0], 99)
    b.old[1] = float("nan")
    (got,) = grpo.assess(SimpleNamespace(roles={}), [b], grpo.Objective(kl=0.0))
    assert got.old.tolist() == [-0.5, 1, -0.5]


def test_the_reward_is_a_substring():
    """Defect 4: an answer that lists everything is always right."""
    a = flags.settle("train", {"compat": "substring"})
    t = told(answer="silver or gold or lead")
    assert a.reward == "cover-em"
    scores = [train.judge(SimpleNamespace(reward=r, group=1), [t]).item() for r in ("em", "cover-em")]
    assert scores == [0, 1]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "clean")


def trained(out, *more):
    """The policy after a run, and the objectives and batches of its updates."""
    seen, learn = [], grpo.learn

    def spy(model, batches, optimizer, objective, *rest):
        seen.append((objective, batches))
        return learn(model, batches, optimizer, objective, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "learn", spy)
        train.main([*CHEAP, "--out", str(out), *more])
    return load_state(out / "state.safetensors")[0]["policy"], seen


@pytest.mark.parametrize("defect", [*DEFECTS, "zerosearch"])
def test_a_defect_reaches_the_run(defect, clean, tmp_path, monkeypatch):
    """A switch that is connected to nothing measures nothing. (The KL's sign is seen here.)"""
    if defect in ("example", "zerosearch"):  # the toy prompt has no example
        monkeypatch.setattr(compat, "example", lambda t, tok: t.question.answers[0])
        monkeypatch.setattr(train, "episode", cut(train.episode))
    cuts, nucleus = [], compat.nucleus
    monkeypatch.setattr(compat, "nucleus", lambda *args: cuts.append(1) or nucleus(*args))
    policy, seen = trained(tmp_path / "run", "--compat", defect)
    assert bool(cuts) == (defect in ("top-p", "zerosearch"))
    assert torch.isfinite(policy).all() and (not torch.equal(policy, clean[0]) or defect == "substring")
    signs = {o.kl > 0 for o, _ in seen}
    assert signs == {defect not in ("kl-sign", "zerosearch")}
    unknown = any(b.old.isnan().any() for _, batches in seen for b in batches)
    assert unknown == (defect in compat.RETOLD | {"zerosearch"})
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert defect != "example" or all(row["em"] == 1 for row in rows)


def cut(episode):
    """Episodes that never answer."""

    def silent(*args):
        t = yield from episode(*args)
        t.answer = None
        return t

    return silent
