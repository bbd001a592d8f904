"""The cold start: traces scripted, recorded and read; the reference of a policy that began with one; a
simulator that heeds the query."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_collect import ANN, LIMITS, WORDS, Letters, engine_of, play
from test_train import fails, run, shorten  # noqa: F401

import train
import weights
from cli import flags
from cli.disk import read_json
from cli.setting import policy_words
from model import POLICY, REFERENCE
from prepare import cold
from prepare.collect import Collector
from prepare.traces import example, parse_trace
from rollout import Query, Question
from simulator import Simulator, covered, noise_coin
from words import POLICY_WORDS_FILE, Words

NAMES = "pa qa ra sa ta ua va wa".split()  # noqa: SIM905
QUESTIONS = [Question(f"Who is the {w} of it?", (w.upper(),), w) for w in NAMES]
KNOWN = engine_of({w: f"Doc 1: {w.upper()} is it" if w < "u" else "Doc 1: no" for w in NAMES})


def test_a_script_searches_for_content_and_answers_with_what_it_found():
    """A trace whose answer is not in its documents teaches a policy to ignore them; one whose query is the
    whole question teaches nothing about queries. Whether a trace searches must not depend on its question:
    those that answer at once are about questions that the engine could answer, too."""
    traces = list(cold.script(QUESTIONS, KNOWN, 4, 0.5, seed=0))
    searching = [t for t in traces if len(t["spans"]) == 3]
    assert len(searching) == 2 and len({t["question"] for t in traces}) == 4
    for t in traces:
        *read, (_, answer) = t["spans"]
        (gold,) = t["golden_answers"]
        assert answer == f"<answer> {gold} </answer>" and gold in ("PA", "QA", "RA", "SA", "TA")
        if read:
            (_, query), (what, documents) = read
            assert query == f"<search> {gold.lower()} </search>" and what == "documents" and gold in documents
    again = list(cold.script(QUESTIONS, KNOWN, 4, 0.5, seed=0))
    others = [list(cold.script(QUESTIONS, KNOWN, 4, 0.5, seed=seed)) for seed in range(1, 9)]
    assert again == traces and traces not in others
    which = {t["question"] for traces in others for t in traces if len(t["spans"]) == 3}
    assert len(which) == 5  # any of them may search


def test_too_few_questions_for_a_script_are_an_error():
    """Fewer traces than --scripts says are another cold start than was asked for."""
    with pytest.raises(ValueError, match="finds the answers of 5 of 8 questions"):
        list(cold.script(QUESTIONS, KNOWN, 7, 1.0, seed=0))


def test_a_recorded_episode_is_learnt_as_it_was_sampled():
    """The ids of the episode itself, prompt and observation included, and its mask: else a cold start learns
    to read other text than the policy will meet. An invalid turn's notice is given, not learnt."""
    says = {POLICY: ["hm", "<search>a</search>", "<answer>Ann</answer>"], REFERENCE: ["yes"]}
    collector = Collector(Letters(), engine_of({"a": "Doc 1: it is Ann"}), LIMITS, WORDS)
    episode = collector.episode(ANN, (0, 0, 0, 0))
    seen = []
    (row, turns) = play(episode, says)
    seen = [i for turn in turns if turn.role == POLICY for i in turn.ids]
    assert row["f1"] == 1.0 and row["golden_answers"] == ["Ann", "Anna"]
    assert [what for what, _ in row["spans"]] == ["sampled", "given", "sampled", "documents", "sampled"]
    e = example(Letters(), WORDS, LIMITS, parse_trace(json.loads(json.dumps(row))))
    given = [i for i, m in zip(e.ids, e.mask) if not m]
    assert given == seen
    assert Letters().decode([i for i, m in zip(e.ids, e.mask) if m]) == (
        "hm<search>a</search><answer>Ann</answer>"
    )


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"question": "q", "golden_answers": ["a"]}, "no list under"),
        ({"question": "q", "spans": [["said", "x"]]}, "KIND is one of"),
        ({"question": "q", "spans": [["given", "x"]]}, "nothing sampled"),
        ({"question": "q", "spans": [["sampled", ""]]}, "nothing sampled"),
        ({"question": "q", "spans": [["sampled", "x"]], "f1": None}, "no number"),
    ],
)
def test_a_broken_trace_is_refused(row, complaint):
    """One line that says what a trace is, instead of a KeyError within the fine-tuning."""
    with pytest.raises(ValueError, match=complaint):
        parse_trace(row)


def tune(out, *more):
    """A cold start of the random body in the toy world."""
    told = ["--policy", "tiny", "--data", "toy", "--scripts", "12", "--searching", ".5"]
    told += [] if "--traces" in more else ["--search", "toy"]
    told += ["--limit", "200", "--steps", "4", "--every", "2", "--held", "2", "--out", out, *more]
    cold.main([str(x) for x in told])


def test_a_cold_start_is_where_the_run_begins_and_its_reference(body, tmp_path, monkeypatch, capsys):
    """With the body as reference, the KL would pull a policy back to where it could not use the tags. At the
    first step policy and reference are one: KL is exactly 0. And a run asks in the prompts of its adapter."""
    shorten(body, monkeypatch)
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps({"prompt": "{question} now", "notice": ""}))
    out = tmp_path / "cold"
    tune(out, "--policy-prompt", prompts)
    result = read_json(out / "sft.json", "a cold start")
    assert result["after"]["loss"] < result["before"]["loss"] and result["rows"] + result["held"] == 12
    steps = ["--steps", "2", "--questions", "2", "--group", "2", "--eval-questions", "0", "--sft-steps", "0"]
    steps += ["--algorithm", "reinforce"]  # every group teaches
    run("--adapter", out, "--kl", "1", *steps, "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0.0 and rows[0]["trained_tokens"] > 0
    for folder in (out, tmp_path / "run" / "policy"):
        assert read_json(folder / POLICY_WORDS_FILE, "an adapter")["prompt"] == "{question} now"
    m = weights.load("tiny")
    weights.load_adapter(m, POLICY, out)
    assert m.adapter(POLICY).abs().sum() > 0 and m.roles[POLICY].theta[-1] != 0


def test_a_cut_cold_start_goes_on_to_the_same_adapter(body, tmp_path, monkeypatch):
    """Interrupted between two saves, it must end as if it had not been; and its traces are not made again."""
    shorten(body, monkeypatch)
    tune(tmp_path / "whole")
    step = cold.tune.__globals__["disk"].save_state

    def cut(path, tensors, facts):
        step(path, tensors, facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cold.tune.__globals__["disk"], "save_state", cut)
        tune(tmp_path / "cut")
    monkeypatch.setattr(cold, "script", None)
    tune(tmp_path / "cut", "--resume")
    one, two = ((tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("whole", "cut"))
    assert one == two


def test_a_cold_start_that_was_cut_while_it_scripted_goes_on(body, tmp_path, monkeypatch):
    """Traces without a state: neither a plain run nor --resume would have taken that directory."""
    shorten(body, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cold, "tune", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        tune(tmp_path / "cut")
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"traces.jsonl"}
    tune(tmp_path / "cut", "--resume")
    assert (tmp_path / "cut" / "sft.json").exists()
    with pytest.raises(ValueError, match="no unfinished run"):
        tune(tmp_path / "cut", "--resume")


def test_recorded_traces_below_the_bar_are_left_out(body, tmp_path, monkeypatch, capsys):
    """Rejection sampling that keeps the wrong episodes teaches the wrong answers."""
    shorten(body, monkeypatch)
    path = tmp_path / "t.jsonl"
    span = [["sampled", "<answer> Balan </answer>"]]
    rows = [{"question": f"home Balan{i}?", "f1": f, "spans": span} for i, f in enumerate((1.0, 0.4, 0.9))]
    path.write_text("\n".join(map(json.dumps, [{"flags": {}}, *rows])))
    tune(tmp_path / "a", "--traces", path, "--least", ".8")
    assert read_json(tmp_path / "a" / "sft.json", "a cold start")["rows"] == 2
    with pytest.raises(ValueError, match="none of the 1 traces"):
        path.write_text(json.dumps(rows[1]))
        tune(tmp_path / "b", "--traces", path, "--least", "1")
    assert not (tmp_path / "b").exists()  # nothing half-written


def test_the_prompts_of_an_adapter_are_those_of_an_agent_only(tmp_path):
    """A baseline (direct, cot, rag) has prompts of its own, and --policy-prompt overrides both."""
    from argparse import Namespace

    from tasks import Task
    from words import MODE_WORDS, save_words

    save_words(Words("{question} said"), tmp_path / POLICY_WORDS_FILE)
    a = Namespace(policy_prompt="", adapter=str(tmp_path), mode="agent")
    assert policy_words(a, Task(a)).prompt == "{question} said"
    assert policy_words(Namespace(**vars(a) | {"mode": "direct"}), Task(a)) == MODE_WORDS["direct"]
    assert policy_words(Namespace(**vars(a) | {"policy_prompt": "short"}), Task(a)).prompt == "{question}"


def test_a_simulator_that_heeds_wants_the_words_of_the_question():
    """Told the golden answer, a simulator writes it whatever is asked: queries then decay, and a real engine
    finds nothing. Half the content words, half of the useful documents. An episode's queries all count."""
    question = Question("Where was the author of Emma born?", ("Steventon",))
    ask = lambda text, *earlier: Query(text, question, (0, 0, 0, 0, 0), earlier)  # noqa: E731
    assert covered(ask("EMMA's author: born?")) == 1.0 and covered(ask("the author of it")) == pytest.approx(
        1 / 3
    )
    assert covered(ask("born", ("author Emma", "Doc 1: Austen"))) == 1.0 and covered(ask("what")) == 0.0

    def noise(text, heed, p):
        hits = []
        for i in range(400):
            search = Simulator(Letters(), p_noise=p, heed=heed)
            turn = search(Query(text, question, (0, i, 0, 0, 0)))
            next(turn)
            hits.append(turn.gi_frame.f_locals["noisy"])
        return sum(hits) / len(hits)

    assert noise("author Emma born", 1.0, 0.0) == 0.0 and noise("what", 1.0, 0.0) == 1.0
    assert (
        noise("what", 0.0, 0.25) == sum(noise_coin((0, i, 0, 0, 0), False) < 0.25 for i in range(400)) / 400
    )
    assert noise("author of it", 1.0, 0.25) == pytest.approx(0.25 + 0.75 * 2 / 3, abs=0.06)
    assert noise("author of it", 2.0, 0.25) == pytest.approx(0.25 + 0.75 * 8 / 9, abs=0.05)


def test_looks_on_the_way_keep_the_best_policy(body, tmp_path, monkeypatch):
    """Held-out figures every --eval-every steps; the last --keep of those policies stay, and OUT/best is the
    first that scored highest, although the run is cut in between. A look must not change what is learnt."""
    shorten(body, monkeypatch)
    told = ["--steps", "6", "--questions", "2", "--group", "2", "--eval-questions", "6", "--sft-steps", "0"]
    looks = ["--eval-every", "2", "--eval-few", "4", "--keep", "2", "--algorithm", "reinforce"]
    scores, answer, act = iter([0.2, 0.5, 0.5]), train.answer, train.act

    def scored(a, s, held, search, temperature, label):
        summary, trajectories = answer(a, s, held, search, temperature, label)
        if label.startswith("step"):
            assert len(held) == 4 and temperature == 0.0
            summary = summary | {"f1": next(scores)}
        return summary, trajectories

    def cut(a, s, step, asked):
        if step == 4:
            raise OSError("cut")
        return act(a, s, step, asked)

    with monkeypatch.context() as patch:
        patch.setattr(train, "answer", scored)
        patch.setattr(train, "act", cut)
        with pytest.raises(OSError, match="cut"):
            run("--out", tmp_path / "a", *told, *looks)
        patch.setattr(train, "act", act)
        run("--out", tmp_path / "a", "--resume")
    run("--out", tmp_path / "b", *told, "--algorithm", "reinforce")
    rows, plain = (
        [json.loads(line) for line in (tmp_path / x / "log.jsonl").read_text().splitlines()] for x in "ab"
    )
    assert [row.get("held_f1") for row in rows] == [None, 0.2, None, 0.5, None, 0.5]
    assert {"held_searches", "held_query_words", "held_em"} <= rows[1].keys()
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    kept = {p.name for p in (tmp_path / "a" / "policies").iterdir()}
    adapter = lambda *at: tmp_path.joinpath("a", *at, "adapter_model.safetensors").read_bytes()  # noqa: E731
    assert kept == {"4", "6"} and adapter("best") == adapter("policies", "4") != adapter("policies", "6")
    assert adapter("policy") == adapter("policies", "6")


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash on this machine")
def test_the_demonstration_asks_for_flags_that_exist(tmp_path):
    """prepare/real.sh takes an hour: a flag that was renamed would end it after forty minutes. Here a stub
    stands for python, and each command line is settled as by its command. Called again, only what is missing
    runs."""
    stub, told, data = tmp_path / "python", tmp_path / "told", tmp_path / "data"
    stub.write_text(f"""#!{sys.executable}
import json, sys
from pathlib import Path
argv = sys.argv[1:]
with open({str(told)!r}, "a") as f:
    f.write(json.dumps(argv) + "\\n")
if argv[0] == "-":
    Path(argv[2], "train.jsonl").touch()
ends = "sft.json" if "prepare.cold" in argv else "result.json"
for flag, made in (("--json", ""), ("--out", ends)):
    if flag in argv:
        made = Path(argv[argv.index(flag) + 1], made)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.touch()
""")
    stub.chmod(0o755)
    data.mkdir()
    go = [str(Path(train.__file__).parent / "prepare/real.sh"), "tiny", str(data), str(tmp_path / "out")]
    for lines in (1 + 2 + 3 + 14 + 11, 11):  # the split, cold starts, runs, evaluations, comparisons
        told.unlink(missing_ok=True)
        subprocess.run(
            ["bash", *go], check=True, env=os.environ | {"PYTHON": str(stub)}, stdout=subprocess.PIPE
        )
        calls = [json.loads(line) for line in told.read_text().splitlines()]
        assert len(calls) == lines
        for argv in calls:
            command = {"-m": "cold", "train.py": "train", "eval.py": "eval"}.get(argv[0])
            if command:
                given = flags.given_to(command, "", argv[2:] if command == "cold" else argv[1:])
                a = flags.settle(command, given)
                assert command == "eval" or a.out.startswith(str(tmp_path / "out" / "0"))
