"""Promises of README and CHANGELOG that no other test names. RELIABILITY.md lists all of them."""

import gzip
import json
import pickle
from types import SimpleNamespace

import pytest

import search
import train
import weights
from cli import flags, ranks
from prepare import command
from questions import load_questions
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
