"""The whole run, on a random body in the toy world: contracts of the output, resuming, and bad input."""

import contextlib
import io
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_servers import Place, say, written

import recipes
import servers
import train
import weights
from cli import flags, plan, screen
from model import SIMULATOR
from recipes import Objective
from rollout import Question, Trajectory
from toy import texts

SHORT = [
    *("--steps", "4", "--questions", "2", "--group", "2", "--eval-questions", "4"),
    *("--sft-steps", "2", "--save-every", "2", "--show-every", "3"),
]


def shorten(body, patch):
    """That body in the toy world, and its audit on 8 searches of a kind: 200 are most of a short run."""
    patch.setitem(weights.PRESETS, "tiny", str(body))
    patch.setattr(texts.audit, "__defaults__", (8, 0))


@pytest.fixture
def tiny(body, monkeypatch):
    shorten(body, monkeypatch)


def settle(**given):
    return flags.settle("train", given)


def run(*argv):
    train.main([str(x) for x in argv])


def fails(capsys, *argv):
    """The one line that a command prints when it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        screen.run(lambda: run(*argv))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("error: ") and "\n" not in err
    return err


@pytest.fixture(scope="module")
def whole(body, tmp_path_factory):
    """A run from its first step to its last: its directory, and what it printed."""
    out, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shorten(body, patch)
        run("--out", out, *SHORT, "--memory", "0.06")
    return out, printed.getvalue()


def test_a_run_writes_what_it_promises(whole):
    """The names in the run's directory are a contract with everything that reads them."""
    out, printed = whole
    result = json.loads((out / "result.json").read_text())
    for when in ("before", "after", "before_greedy", "after_greedy"):
        assert {"f1", "em", "cover_em", "searches", "n", "by_hop"} <= result[when].keys()
        assert result[when]["n"] == 4
    assert {"useful_hit", "noisy_hit", "leak"} <= result["simulator"].keys() and result["seconds"] > 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    fields = "reward em searches length ends noise seconds_act seconds_learn tokens_per_second skipped_groups"
    assert set(fields.split()) <= log[0].keys()
    for part in ("policy", "simulator"):
        assert (out / part / "adapter_config.json").exists()
        assert (out / part / "adapter_model.safetensors").exists()
    assert printed.count("sampled, before") == 2 and printed.count("sampled, after") == 1
    assert "step   4/4" in printed and "golden" in printed
    asked = printed.split("the simulator's documents for ")[1].split(" (golden")[0]
    assert not asked.endswith("?'")  # policies search without a mark, and a tuned simulator knows no other


def log_of(out):
    """The log without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_run_that_was_cut_goes_on_as_if_it_had_not(tiny, whole, tmp_path, monkeypatch):
    """Resuming must lose nothing and change nothing: same steps, same simulator, same result. (The rewards of
    a random body are equal: for what is learnt, see test_learning.py.)"""
    (whole, _), cut = whole, tmp_path / "cut"
    learn, calls = train.learn, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(train, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        run("--out", cut, *SHORT, "--memory", "0.06")
    assert not (cut / "result.json").exists()
    monkeypatch.setattr(train, "learn", learn)
    run("--out", cut, "--resume")
    assert log_of(cut) == log_of(whole)
    kept = [(d / "episodes.jsonl").read_text() for d in (whole, cut)]
    assert kept[0] == kept[1]
    assert [json.loads(line)["step"] for line in kept[0].splitlines()] == [0, 1, 2, 3, 4, 5]
    for part in ("policy", "simulator"):
        same = [(d / part / "adapter_model.safetensors").read_bytes() for d in (whole, cut)]
        assert same[0] == same[1]
    results = [json.loads((d / "result.json").read_text()) for d in (whole, cut)]
    assert all(results[0][k] == results[1][k] for k in results[0] if k != "seconds")


def test_bad_flags_are_one_line(tiny, tmp_path, capsys):
    """A typing error must not cost a traceback, a download or a half-made directory."""
    out = tmp_path / "run"
    for argv, words in [
        (["--group", "1"], "group 1"),
        (["--noise-end", "1.5"], "within 0..1"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--steps", "many"], "invalid int"),
        (["--steps", "0"], "at least 1"),
        (["--algorithm", "magic"], "invalid choice"),
        (["--policy", "4b"], "preset"),
        (["--prompt-tokens", "190"], "no room"),
        (["--seat-tokens", "100"], "cannot hold an episode"),
        (["--eval-data", "x.jsonl"], "--eval-data needs --data"),
        (["--policy-prompt", "nowhere.json"], "nowhere.json"),
        (["--prompt-tokens", "3"], "tokens, over 3"),
        (["--turns", "-1"], "--turns must be at least 0"),
        (["--sim-tokens", "0"], "--sim-tokens must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--lr", "nan"], "--lr must be a number"),
        (["--resume"], "needs the --out"),
    ]:
        extra = [] if argv == ["--resume"] else ["--out", out, "--eval-questions", "0", "--sft-steps", "0"]
        assert words in fails(capsys, *argv, *extra), argv


def test_an_out_that_holds_another_run_is_refused(tiny, whole, tmp_path, capsys):
    """Two runs in one directory would mix their logs; a run resumed with other flags would be two runs."""
    out, _ = whole
    assert "already holds" in fails(capsys, "--out", out, *SHORT)
    assert "other arguments" in fails(capsys, "--out", out, "--resume", "--clip-low", "0.5")
    assert "is not the directory of a run" in fails(capsys, "--out", tmp_path / "none", "--resume")


def test_question_files_are_checked_by_line(body, tmp_path, capsys):
    """A broken line in a question file must be named by its number, before anything is loaded."""
    data = tmp_path / "q.jsonl"
    good = json.dumps({"question": "who?", "golden_answers": ["me"]})
    for line, words in [("{", "line 2"), ('{"question": "why?", "golden_answers": []}', "line 2")]:
        data.write_text(good + "\n" + line + "\n")
        assert words in fails(capsys, "--policy", body, "--data", data, "--out", tmp_path / "run")
    assert "nowhere.jsonl" in fails(
        capsys, "--policy", body, "--data", "nowhere.jsonl", "--out", tmp_path / "run"
    )


def test_every_question_once_before_any_comes_again(tiny):
    """Sampling with replacement would leave a third of the questions unseen in an epoch."""
    a = settle(questions=7)
    seen = [number for step in range(30) for number, _ in train.ask(a, list(range(30)), step)]
    for epoch in range(7):
        assert sorted(seen[30 * epoch : 30 * (epoch + 1)]) == list(range(30))
    assert seen[:30] != seen[30:60]


def test_a_question_that_comes_twice_in_a_step_has_two_addresses(tiny):
    """With one address its two groups would be copies of each other, token for token."""
    a = settle(questions=7)
    for step in range(5):
        asked = train.ask(a, ["a", "b", "c"], step)
        assert len({number for number, _ in asked}) == 7
        assert all(question == "abc"[number % 3] for number, question in asked)


def test_the_learning_rate_is_whole_at_once_and_falls_to_the_end(tiny, monkeypatch):
    """Defect 12: the learning rate was still warming up when 95 % of the run was over."""
    rates = []
    monkeypatch.setattr(
        train.grpo, "learn", lambda *a: rates.append(a[2].param_groups[0]["lr"]) or {"kl": 0.0}
    )
    a = settle(steps=10, questions=1, group=2)
    t = Trajectory(Question("q", ("a",)), ids=[1, 2], mask=[0, 1], logps=[0.0, -1.0])
    pool = SimpleNamespace(cache=None)
    s = SimpleNamespace(body=None, engine=SimpleNamespace(pools={train.POLICY: pool}))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for step in range(10):
        train.learn(a, s, step, [t, t], torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), optimizer)
    assert rates == pytest.approx([a.lr * (1 - i / 10) for i in range(10)])


def test_groups_without_a_difference_give_way_to_others(tiny, monkeypatch):
    """Dynamic sampling that asks the same again draws the same; that never stops, stops a run on an easy set;
    that forgets which group a reward belongs to teaches noise."""
    a, asked = settle(algorithm="dapo", steps=9, questions=3, group=2, **{"eval-questions": 0}), []

    def act(a, s, step, pairs):
        asked.append([number for number, _ in pairs])
        return [(question, sibling) for _, question in pairs for sibling in range(2)]

    # Question 7 alone has siblings that differ; the others are all right or all wrong.
    def judge(a, pairs):
        return torch.tensor([float(q % 2 if q != 7 else sibling) for q, sibling in pairs]).view(-1, 2)

    monkeypatch.setattr(train, "act", act)
    monkeypatch.setattr(train, "judge", judge)
    world, rounds, others = train.World(list(range(8)), [], None), set(), set()
    for step in range(9):
        asked.clear()
        first = act(a, None, step, train.ask(a, world.questions, step))
        rewards = judge(a, first)
        ts, new = train.resample(a, None, world, step, first, rewards)
        assert torch.equal(judge(a, ts), new) and len(ts) == 6 and torch.equal(rewards, judge(a, first))
        kept = [q for q in range(3) if rewards[q, 0] != rewards[q, 1]]
        assert all(ts[2 * q : 2 * q + 2] == first[2 * q : 2 * q + 2] for q in kept)
        numbers = [n for part in asked for n in part]
        assert len(set(numbers)) == len(numbers) and len(asked) <= 1 + a.resample == 4
        assert all(new[q, 0] != new[q, 1] for q in range(3)) or len(asked) == 4
        if len(asked) > 1:
            others |= {n % 8 for n in asked[1]} - {n % 8 for n in asked[0]}
        rounds.add((len(asked), len(kept), int(recipes.informative(new).sum())))
    assert any(after > before for _, before, after in rounds) and len(others) > 3
    a.resample = 0
    assert train.resample(a, None, world, 0, first, rewards)[0] == first


def test_what_cannot_fit_is_refused_with_the_arithmetic(tiny, tmp_path, capsys):
    """A run that dies of memory after an hour has wasted it: the plan is made before a body is loaded."""
    err = fails(capsys, "--out", tmp_path / "run", "--memory", "0.001", *SHORT)
    assert "GiB even with --seats 2" in err and "weights" in err and not (tmp_path / "run").exists()


def test_memory_settles_what_was_not_given(whole):
    """The plan is what the run does: printed at the start, kept in args.json, the same when it goes on."""
    out, printed = whole
    settled = json.loads((out / "args.json").read_text())["settled"]
    assert settled["seats"] >= 2 and f"--seats {settled['seats']} " in printed


def test_the_loss_has_the_defaults_of_the_flags(whole):
    """Who calls grpo.py from a program of his own would optimise something else than train.py does."""
    settled = json.loads((whole[0] / "args.json").read_text())["settled"]
    usual = asdict(Objective())
    assert all(settled[name] == usual[name] for name in ("kl", "entropy", "grad_clip"))


def test_a_body_in_bf16_trains(tmp_path, monkeypatch):
    """bf16 is the default on a GPU: fp32 adapters meet narrow activations in fine-tuning, its held-out loss,
    sampling, the KL reference and the update."""
    monkeypatch.setattr(texts.audit, "__defaults__", (4, 0))
    run("--out", tmp_path, *SHORT, "--steps", "1", "--dtype", "bf16", "--eval-questions", "2")
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["kl"] < 0.1


SERVED = [
    *("--steps", "3", "--questions", "4", "--group", "4", "--eval-questions", "0"),
    *("--save-every", "9", "--show-every", "9", "--noise-start", "0.5"),
]


def test_a_simulator_on_a_server_may_fail_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    """Defect 11: failed searches were retried for ever, or became text to learn from. A fault ends the run in
    one line, nothing of its step is kept, and the run that goes on equals one without a fault."""
    monkeypatch.setattr(servers, "PAUSE", 0.02)
    models_of, good = say({"data": [{"id": "sim"}]}), say(written("Doc 1: red amber"))
    place = Place(models_of, good)
    sim = ["--sim", f"{place.address}/v1", *SERVED]
    run("--out", tmp_path / "whole", *sim)
    asked = [body for _, body, *_ in place.requests if body]
    assert len(asked) > 10 and any("noisy" in json.dumps(body).lower() for body in asked)

    place.requests.clear()
    place.script = [models_of, *[good] * (len(asked) // 2), say(b"<html>out of order")]
    err = fails(capsys, "--out", tmp_path / "cut", *sim)
    assert place.address in err
    # A last request of the run that failed may still arrive.
    place.script = [lambda handler: (good if handler.body else models_of)(handler)]
    run("--out", tmp_path / "cut", "--resume")
    whole, cut = (load_file(tmp_path / d / "state.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    place.close()


def test_a_run_that_learns_in_the_caches_memory_learns_the_same(tiny, tmp_path, monkeypatch):
    """Policy and critic, with what the planner chooses for a GPU with little memory: pages, and activations
    among them. The second step acts in pages that held activations."""
    argv = [*SHORT, "--steps", "2", "--sft-steps", "0", "--eval-questions", "0", "--no-audit"]
    argv += ["--algorithm", "ppo", "--entropy", "0.1"]  # a gradient although rewards are equal
    fit, after = plan.fit, {}
    for lend in (False, True):

        def on_a_gpu(*args, lend=lend):
            s, b = fit(*args)
            return replace(s, lend=lend, pages=plan.most_pages(replace(s, seats=3))), b

        monkeypatch.setattr(plan, "fit", on_a_gpu)
        run("--out", tmp_path / f"{lend}", *argv)
        after[lend] = load_file(tmp_path / f"{lend}" / "state.safetensors")
    rows, lent = log_of(tmp_path / "False"), log_of(tmp_path / "True")
    assert all(row.pop("lent_mib") > 0.05 for row in lent) and "lent_mib" not in rows[0]
    assert [row["length"] for row in lent] == [row["length"] for row in rows]
    assert all(row["grad_norm"] > 0 and row["critic_norm"] > 0 for row in rows)
    assert all(torch.allclose(after[True][k].float(), x.float(), atol=1e-6) for k, x in after[False].items())


def test_audits_of_steps_are_weighed_by_their_searches():
    """A step of two searches must not count as much as one of two hundred."""
    whole = {}
    train.add_audit(whole, {"useful": {"n": 1, "answer": 1.0}})
    train.add_audit(whole, {"useful": {"n": 3, "answer": 0.0}, "noisy": {"n": 2, "words": 5.0}})
    train.add_audit(whole, {"useful": {"n": 4, "answer": 1.0}})
    assert whole == {"useful": {"n": 8, "answer": pytest.approx(5 / 8)}, "noisy": {"n": 2, "words": 5.0}}


@pytest.mark.parametrize("steps, held", [(2, 16), (250, 64)])
def test_the_simulators_tuning_holds_rows_out(steps, held, capsys, monkeypatch):
    """A held-out loss of rows that are trained on too says nothing; too many held out are not learnt.
    Progress is told every 25 steps and at the end."""
    seen = []

    def sft(body, tok, words, rows, steps, lr, every, seed, exam):
        seen.append(({r["query"] for r in exam}, {r["query"] for r in rows}, len(exam), len(rows)))
        return [SimpleNamespace(step=i, held=0.5 if i == 26 else None) for i in (24, 25, 26)]

    monkeypatch.setattr(train, "sft", sft)
    task = SimpleNamespace(rows=lambda n: [{"query": i} for i in range(n)])
    s = SimpleNamespace(bodies={SIMULATOR: (None, None)}, task=task, simulator=SimpleNamespace(words=None))
    train.tune_simulator(settle(**{"sft-steps": steps}), s)
    (exam, rows, n, rest) = seen[0]
    assert n == held and n + rest == 80 * steps and not exam & rows
    assert capsys.readouterr().out.count("step=") == 2
