"""Promises of README and CHANGELOG that no other test names. RELIABILITY.md lists all of them."""

import gzip
import importlib
import io
import json
import os
import pickle
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import cli
import eval
import search
import train
import weights
from cli import flags, ranks, screen
from cli.disk import Rows, claimed, load_state, pinned, same_flags, save_state, write_json
from prepare import cold, command
from prepare.traces import parse_trace
from questions import load_questions
from rollout import Question
from search import ask, open_search, read_lines
from servers import LARGEST, Server, ServerError
from tokenizer import Tokenizer

from . import fuzz
from .guard import noted


def test_an_archive_unpacks_to_so_much_and_no_more(tmp_path):
    """50 times its size and 16 MB; a parquet file to 100 times and 64 MB: a small file must not fill the
    memory. A text of ten times its archive's size is read. (A dictionary's text was counted once, and a
    million references to it filled 17 GB.)"""
    import pyarrow
    from pyarrow import parquet

    bomb, text = tmp_path / "bomb.jsonl.gz", tmp_path / "text.jsonl.gz"
    bomb.write_bytes(gzip.compress((b" " * 2**20 + b"\n") * 32, 1))
    with pytest.raises(ValueError, match="unpacks to far more than a text of its size"):
        list(read_lines(bomb, dict))
    text.write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000))
    assert len(list(read_lines(text, dict))) == 10_000
    many = pyarrow.nulls(10**5, pyarrow.int8()).fill_null(0)
    column = pyarrow.DictionaryArray.from_arrays(many, ["x" * 2_000])
    parquet.write_table(pyarrow.table({"question": column}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match="unpacks to more than 100 times its size"):
        load_questions(tmp_path / "q.parquet")


def test_a_run_begun_before_a_flag_existed_is_not_resumed(tmp_path):
    """The flag may have changed what a run does: with its default it would be another run."""
    old = {f.key: f.default for f in flags.flags_of("train")}
    del old["heed"]
    (tmp_path / "args.json").write_text(json.dumps({"settled": old}))
    with pytest.raises(ValueError, match="begun by a version that had no --heed"):
        train.resumed({"out": str(tmp_path), "resume": True})


def test_fine_tuning_refuses_torchrun(monkeypatch):
    """Each process would train an adapter of its own, and all write one file. (prepare.cold tunes so too.)"""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(ValueError, match="the work of one process: start it without torchrun"):
        command.tune(SimpleNamespace(), None, 0, [], [], lambda s: None)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    """A checkpoint may name its own Python files (auto_map), or hold its weights as a pickle, which is a
    program. Neither is run, or read."""
    ran = tmp_path / "ran"
    home = tmp_path / "body"
    home.mkdir()
    for path in fuzz.body().iterdir():
        (home / path.name).write_bytes(path.read_bytes())
    (home / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass T: pass\nclass C: pass\n")
    for name, auto in (
        ("tokenizer_config", {"AutoTokenizer": ["evil.T", "evil.T"]}),
        ("config", {"AutoConfig": "evil.C"}),
    ):
        value = json.loads((home / f"{name}.json").read_text()) | {"auto_map": auto}
        (home / f"{name}.json").write_text(json.dumps(value))

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    (home / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with noted(tmp_path) as seen:
        Tokenizer.load(home)
        with pytest.raises(ValueError, match="auto_map"):
            weights.load(home)
        (home / "config.json").write_bytes((fuzz.body() / "config.json").read_bytes())
        (home / "model.safetensors").unlink()
        with pytest.raises((ValueError, OSError), match="safetensors"):
            weights.load(home)
    assert not ran.exists() and not [what for what in seen if "pickle" in what or "socket" in what]


def test_a_query_to_a_server_is_cut_to_500_characters(monkeypatch):
    """A policy that never closes its query would post a book, or an address that no server takes."""
    asked = []
    monkeypatch.setattr(Server, "ask", lambda self, read, path, body: asked.append(body) or [])
    assert ask(open_search("http://127.0.0.1:9"), "x" * 10_000) == ""
    assert asked[0]["queries"] == ["x" * search.QUERY] and search.QUERY == 500


def test_an_answer_of_more_than_16_mib_is_refused():
    """Whoever sends without end would fill the memory of the machine that trains."""
    server = Server("http://127.0.0.1:9", "a server")
    server._exchange = lambda *_: (SimpleNamespace(status=200, reason="OK"), b" " * (LARGEST + 1))
    with pytest.raises(ServerError, match="answered more than 16 MiB"):
        server.ask(lambda answer: answer)


ANSWERED = {
    "set": "nq",
    "number": 1,
    **{k: v for k, v in fuzz.ANSWERED.items() if k != "set"},
    "seconds": 0.5,
}
ASKED = [Question(text, ("b",), "1", 1) for text in ("z?", "a?")]


@pytest.mark.parametrize(
    "odd",
    [
        {"number": "0"}, {"number": -1}, {"number": 0.0}, {"number": 2}, {"question": "c?"}, {"hops": {}},
        {"golden_answers": ["c"]}, {"f1": "x"}, {"f1": float("inf")}, {"seconds": None}, {"end": []},
    ],
    ids=str,
)  # fmt: skip
def test_answers_that_were_kept_are_looked_at(tmp_path, odd):
    """A row that is none was a traceback after all questions were answered; the number -1 counted a question
    twice, and golden answers that had changed in between were scored with the others."""
    path = tmp_path / "r.json.part"
    for row, fine in ((ANSWERED, True), (ANSWERED | odd, False)):
        path.write_text(json.dumps({"flags": {}}) + "\n" + json.dumps(row) + "\n")
        log = Rows(path, {}, True, lambda row: (row["set"], row["number"]))
        if fine:
            assert eval.answered_before(log, "nq", ASKED) == {1}
            log.file.close()
        else:
            with pytest.raises(ValueError, match=r"r\.json\.part"):
                eval.answered_before(log, "nq", ASKED)


def test_a_collection_goes_on_with_its_questions(tmp_path):
    """With another file under the same --data, its episodes were mixed with those of the first."""
    a = SimpleNamespace(judge="answer", rows=4)
    done = {"question": "a?", "golden_answers": ["b"], "forced": False, "rows": []}
    for number, wrong in ((1, ""), (0, "other questions"), (-1, "an episode -1"), ("1", "something else")):
        log = Rows(None)
        log.path, log.rows = tmp_path / "log", {number: done}
        if wrong:
            with pytest.raises(ValueError, match=wrong):
                command.collected_before(log, ASKED, a)
        else:
            command.collected_before(log, ASKED, a)


def test_a_fine_tuning_goes_on_with_its_own_state_and_rows(tmp_path):
    """--out with a training's directory was a traceback; a changed file of rows was learnt from as if it were
    the first."""
    path, asked = tmp_path / command.STATE_FILE, {"flags": {"lr": 1.0, "steps": 9}, "rows": "x"}
    facts = asked | {"step": 3, "before": {}}
    save_state(path, {"adapter": torch.ones(2)}, facts)
    assert command.unfinished(tmp_path, asked, True)[1] == facts
    with pytest.raises(ValueError, match="begun with other rows"):
        command.unfinished(tmp_path, asked | {"rows": "y"}, True)
    for odd, says in (
        ({"step": 10}, "10 steps"),
        ({"before": {"x": 1}}, "not the state"),
        ({"flags": 1}, "not"),
    ):
        save_state(path, {"adapter": torch.ones(2)}, facts | odd)
        with pytest.raises(ValueError, match=says):
            command.unfinished(tmp_path, asked, True)
    save_state(path, {"other": torch.ones(2)}, facts)
    with pytest.raises(ValueError, match="not the state of a fine-tuning"):
        command.unfinished(tmp_path, asked, True)
    save_state(path, {"adapter": torch.ones(2)}, {k: v for k, v in facts.items() if k != "rows"})
    command.unfinished(tmp_path, asked, True)  # of an earlier version
    path.write_bytes(fuzz.state())
    with pytest.raises(ValueError, match=r"not the state of a fine-tuning: is --out right\?"):
        command.unfinished(tmp_path, asked, True)


@pytest.mark.parametrize("fact", ["step", "updates", "before", "documents", "simulator"])
def test_a_state_with_other_facts_is_none(tmp_path, fact):
    """A state that says "step": "x" was a traceback in the middle of a resumed run."""
    path = tmp_path / "state.safetensors"
    path.write_bytes(fuzz.state())
    fuzz._state(path, tmp_path)
    tensors, facts = load_state(path)
    save_state(path, tensors, facts | {fact: "x"})
    with pytest.raises(ValueError, match="not the state of a training"):
        fuzz._state(path, tmp_path)
    save_state(path, tensors | {"policy": torch.ones(9)}, facts)
    with pytest.raises(ValueError, match=r"for .* parameters"):
        fuzz._state(path, tmp_path)
    for wrong in ({"optimizer.0.exp_avg": torch.ones(9)}, {"optimizer.7.exp_avg": torch.ones(8)}):
        save_state(path, tensors | wrong, facts)
        with pytest.raises(ValueError, match=r"of another optimiser|something else"):
            fuzz._state(path, tmp_path)
    save_state(path, tensors, facts | {"step": 99})
    with pytest.raises(ValueError, match="has taken 99 steps of 9"):
        fuzz._state(path, tmp_path)


def test_an_adapter_that_has_changed_is_seen(tmp_path):
    """The flag names the same directory, and half of the answers would be another policy's."""
    flags_of = {"adapter": str(tmp_path), "policy": "3b", "limit": 3}
    (tmp_path / "adapter_config.json").write_text("{}")
    before = pinned(flags_of)
    (tmp_path / "result.json").write_text("{}")  # as of an evaluation that wrote beside the weights
    assert before["policy"] == "3b" and pinned(flags_of) == before
    same_flags(json.loads(json.dumps(before)), before, tmp_path)
    same_flags(flags_of, before, tmp_path)  # an earlier version kept no fingerprint
    (tmp_path / "adapter_config.json").write_text("{ }")
    with pytest.raises(ValueError, match="another --adapter"):
        same_flags(json.loads(json.dumps(before)), pinned(flags_of), tmp_path)


def test_no_link_leads_out_of_a_run(tmp_path):
    """In a directory that somebody else made, a link with a name of ours led to any file of the user."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine"), run.mkdir()
    for name in ("args.json.tmp", "log.jsonl"):
        (run / name).symlink_to(victim)
    write_json(run / "args.json", {"a": 1})
    assert json.loads((run / "args.json").read_text()) == {"a": 1} and not (run / "args.json").is_symlink()
    with pytest.raises(ValueError, match=r"log\.jsonl is a link"):
        Rows(run / "log.jsonl", resume=True)
    (run / "log.jsonl").unlink(), (tmp_path / "elsewhere").mkdir()
    (run / "policies").mkdir(), (run / "policies/4").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="policies/4 is a link"), claimed(run, resume=True):
        pass
    assert victim.read_text() == "mine"


def test_no_number_is_too_large_for_what_it_is_for():
    """--steps with thirty zeros and --alpha 1e308 were tracebacks after a step."""
    too_large = {int: 10**30, float: 1e300}
    for flag in (flag for name in flags.COMMANDS for flag in flags.flags_of(name)):
        if flag.kind in too_large:
            with pytest.raises(ValueError, match="must be"):
                flag.check(too_large[flag.kind])
    with pytest.raises(ValueError, match="fewer than --scripts 2147483648"):
        next(cold.script(ASKED, None, 2**31, 0.5, 0))


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_streams_that_are_closed_or_narrow_end_nothing(monkeypatch, name):
    """A command with >&- ended in a traceback at its first line, and one whose terminal has no letter for a
    title in an error."""
    monkeypatch.setattr(sys, name, None), monkeypatch.setattr(sys, f"__{name}__", None)
    importlib.reload(cli)
    assert getattr(sys, name) is getattr(sys, f"__{name}__") and getattr(sys, name).name == os.devnull
    narrow = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    screen.run(lambda: print("snow \u2603", flush=True))
    assert narrow.buffer.getvalue() == b"snow \\u2603\n"


def test_scripted_traces_are_those_of_the_flags(tmp_path, monkeypatch):
    """A cold start that was cut between its traces and its first save went on with them, whatever its flags
    were by then, and recorded the new ones."""
    monkeypatch.setattr(cold, "script", lambda *a: iter([{"question": "a?", "spans": [["sampled", "x"]]}]))
    task = SimpleNamespace(to_collect=list, search=lambda name: None)
    a = SimpleNamespace(search="toy", scripts=1, searching=0.5, seed=0, policy="3b")
    path = cold.scripted(a, task, tmp_path)
    assert cold.scripted(a, task, tmp_path) == path
    assert [row for row in read_lines(path, parse_trace) if row] == list(cold.script())
    a.scripts = 2
    with pytest.raises(ValueError, match="another --scripts"):
        cold.scripted(a, task, tmp_path)
    path.write_text(path.read_text().partition("\n")[2])
    cold.scripted(a, task, tmp_path)  # of an earlier version
