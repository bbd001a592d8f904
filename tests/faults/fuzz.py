"""Hostile files, answers and command lines: each is a valid one, damaged at places that its number chooses.

    python -m tests.faults.fuzz                      # the quick part: about 2,000 inputs
    python -m tests.faults.fuzz --target rows --start 0 --count 5000
    python -m tests.faults.fuzz --target rows --start 1234 --count 1 --show      # one of them, with its files

Not coverage-guided: what is damaged is chosen by hand for each format (bytes, JSON, headers, archives), and
the same number always makes the same input.
"""

import argparse
import gzip
import io
import json
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from .guard import judged, watched

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("inf"), float("nan")),
    *("", " ", "\0", "\ud800", "\u202e", "x" * 5000, "../../x", "/etc/passwd", "http://127.0.0.1:9/", "none"),
    *(
        "{question}",
        "{{ 1/0 }}",
        "<|im_end|>",
        "</information>",
        "\x1b[31m",
        "Doc 1: x\nDoc 2: y",
        "nan",
        "1e9",
    ),
    *([], {}, [[]], [None], [1, "x"], {"a": None}, {"": {"": {}}}, [["a", "b"]], [{}], "0" * 400),
]


class Damage:
    """What chance does to an input."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)

    def value(self) -> object:
        return self.rng.choice(HOSTILE)

    def json(self, value: object, times: int | None = None) -> object:
        """A JSON value, changed at some places."""
        for _ in range(times if times is not None else self.rng.choice((1, 1, 1, 2, 3))):
            holder = {"": json.loads(json.dumps(value))}
            where, key = holder, ""
            while isinstance(where[key], dict | list) and where[key] and self.rng.random() < 0.8:
                where = where[key]
                key = self.rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
            match self.rng.randrange(6):
                case 0 if key != "":
                    del where[key]
                case 1 if isinstance(where, dict) and key != "":
                    where[self.rng.choice((key.upper(), "unknown", "", "type", key * 2))] = where.pop(key)
                case 2 if isinstance(where[key], str):
                    where[key] = self.text(where[key])
                case 3:
                    where[key] = [where[key]]
                case _:
                    where[key] = self.value()
            value = holder[""]
        return value

    def text(self, text: str) -> str:
        at = self.rng.randrange(len(text) + 1)
        return text[:at] + str(self.value()) + text[self.rng.choice((at, len(text))) :]

    def bytes(self, data: bytes) -> bytes:
        """Bytes, cut, flipped, doubled or mixed with others at some places."""
        for _ in range(self.rng.choice((1, 1, 2, 4))):
            a, b = sorted(self.rng.randrange(len(data) + 1) for _ in range(2))
            odd = self.rng.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"]", b'"', b"\n", b"9" * 5000))
            match self.rng.randrange(7):
                case 0:
                    data = data[:a]
                case 1:
                    data = data[:a] + data[b:]
                case 2:
                    data = data[:b] + data[a:]
                case 3 if data:
                    a = min(a, len(data) - 1)
                    data = data[:a] + bytes([data[a] ^ (1 << self.rng.randrange(8))]) + data[a + 1 :]
                case 4:
                    data = data[:a] + self.rng.randbytes(self.rng.randrange(1, 9)) + data[a:]
                case 5:
                    data = data[:a] + odd + data[a:]
                case _:
                    data = b"" if self.rng.random() < 0.1 else data[b:] + data[:a]
        return data

    def dumped(self, value: object) -> bytes:
        """JSON as bytes, now and then not quite."""
        data = json.dumps(value, ensure_ascii=self.rng.random() < 0.5).encode("utf-8", "surrogatepass")
        odds = self.rng.random()
        if odds < 0.02:
            return b'{"a":' * 50_000
        return self.bytes(data) if odds < 0.25 else data

    def lines(self, rows: list[dict]) -> bytes:
        """JSON lines of which one row is changed; or all of them as bytes; or an archive, maybe broken."""
        rows, at = [json.dumps(row).encode() for row in rows], self.rng.randrange(len(rows))
        rows[at] = self.dumped(self.json(json.loads(rows[at])))
        data = self.rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(rows) + b"\n" * self.rng.randrange(2)
        odds = self.rng.random()
        if odds < 0.1:
            data = self.bytes(data)
        if odds > 0.9:
            data = gzip.compress(data, 1)
            data = self.bytes(data) if odds > 0.93 else data
        if odds > 0.9985:
            data = bomb(self.rng.choice((b" ", b"9", b"[")))
        return data

    def tensors(self, data: bytes) -> bytes:
        """A safetensors file whose header says other things, or that is damaged anywhere."""
        size = struct.unpack("<Q", data[:8])[0]
        head, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        match self.rng.randrange(5):
            case 0:
                return self.bytes(data)
            case 1:
                length = self.rng.choice(
                    (0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, self.rng.randrange(2**20))
                )
                return struct.pack("<Q", length) + data[8:]
            case 2:  # sound, but of other numbers
                body = bytearray(body)
                for _ in range(3):
                    at = 4 * self.rng.randrange(max(1, len(body) // 4))
                    body[at : at + 4] = struct.pack(
                        "<f", self.rng.choice((float("nan"), float("inf"), 1e38, -0.0))
                    )
                body = bytes(body)
            case _:
                head = self.json(head)
        head = json.dumps(head).encode()
        return struct.pack("<Q", len(head)) + head + body


@cache
def bomb(byte: bytes) -> bytes:
    """An archive of 1 MB that unpacks to a line of 1 GB: 64 members of 16 MB, which are read as one."""
    return gzip.compress(byte * 2**24) * 64


# ------------------------------------------------------------------------------------------------ the formats


@dataclass(frozen=True)
class Target:
    """make: damage, a folder -> the input, written there. use: what reads it. share: of the quick part."""

    make: Callable[[Damage, Path], object]
    use: Callable[[object, Path], object]
    share: int


TARGETS: dict[str, Target] = {}


def target(share: int, use: Callable[[object, Path], object]):
    """Declare how the input of a format is made, and what reads it."""

    def declare(make):
        TARGETS[make.__name__] = Target(make, use, share)
        return make

    return declare


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _questions(path: Path, folder: Path) -> None:
    from questions import f1, load_questions

    for q in load_questions(path):
        f1(q.text, q.answers)


QUESTIONS = [
    {"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"], "id": "q1", "hops": 2},
    {"question": "yes or no", "answer": "yes"},
    {"question": "Beyonce\u0301 \u4e2d", "answers": ["a", "b"]},
]


@target(6, _questions)
def questions(d: Damage, folder: Path) -> Path:
    return put(folder, "q.jsonl", d.lines(QUESTIONS))


@target(3, _questions)
def parquet(d: Damage, folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    rows, out = d.json(QUESTIONS[:2], d.rng.choice((0, 1))), io.BytesIO()
    if d.rng.random() < 0.003:  # a few bytes that mean a hundred million rows
        indices = pyarrow.nulls(10**8, pyarrow.int8()).fill_null(0)
        text = pyarrow.DictionaryArray.from_arrays(indices, ["x" * 100])
        parquet.write_table(pyarrow.table({"question": text}), out)
        return put(folder, "q.parquet", out.getvalue())
    try:
        parquet.write_table(pyarrow.Table.from_pylist([r for r in rows if isinstance(r, dict)]), out)
    except (pyarrow.ArrowException, TypeError, OverflowError, ValueError, AttributeError):
        parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS[:1]), out)
    return put(folder, "q.parquet", d.bytes(out.getvalue()) if d.rng.random() < 0.8 else out.getvalue())


def _corpus(path: Path, folder: Path) -> None:
    from search import open_bm25

    open_bm25(path).documents("who wrote Emma", 3)


@target(8, _corpus)
def corpus(d: Damage, folder: Path) -> Path:
    rows = [
        {"id": "1", "contents": '"Emma"\nA novel by Jane Austen.'},
        {"title": "T", "contents": "text", "id": 2},
    ]
    return put(folder, "c.jsonl", d.lines(rows))


def _index(path: Path, folder: Path) -> None:
    from eval import retrieval
    from rollout import Question
    from search import ask, load, open_search

    for text in ("who wrote Emma", "novel zebra novel", ""):
        ask(open_search(f"bm25:{path}", 3), text)
    retrieval(load(path), [Question("a novel of Lima", ("Austen",))])


PASSAGES = [("Emma", "a novel by Jane Austen"), ("Lima", "a city"), ("", "novel novel"), ("A", "b c d e f")]


@cache
def index() -> Path:
    """An index on disk, made once."""
    import search

    path = Path(tempfile.mkdtemp())
    search.index(PASSAGES, path)
    return path


@target(6, _index)
def indexes(d: Damage, folder: Path) -> Path:
    import numpy as np

    from search import COLUMNS, VOCABULARY

    whole = {name: (index() / name).read_bytes() for name in (VOCABULARY, *COLUMNS)}
    files = dict(whole)
    for name in d.rng.sample(list(files), k=d.rng.choice((1, 1, 2))):
        how = d.rng.randrange(5)
        if how == 0:
            files[name] = d.bytes(whole[name])
        elif name == VOCABULARY:
            files[name] = d.dumped(d.json(json.loads(whole[name])))
        elif name == "lines":  # passages that are others, and fit
            said = [d.dumped(d.json(list(one))) for one in PASSAGES]
            files["lines"] = b"".join(said)
            files["ends"] = np.cumsum([0, *map(len, said)]).tobytes()
        elif how == 1:
            files[name] = d.rng.choice(list(files.values()))  # another file's, or too long, or none
            files[name] = d.rng.choice((files[name], files[name] * 1000, b""))
        else:
            numbers = np.frombuffer(whole[name], COLUMNS[name]).copy()
            odd = [-1, 0, 1, len(numbers), 2**31 - 1, -(2**31), 3, *numbers.tolist()]
            if numbers.dtype == np.float32:
                odd += [np.nan, np.inf, -np.inf, 3e38]
            elif numbers.dtype == np.int64:
                odd += [2**63 - 1, -(2**63), 2**40]
            for _ in range(d.rng.choice((1, 1, 2, 9))):
                numbers[d.rng.randrange(len(numbers))] = d.rng.choice(odd)
            files[name] = numbers.tobytes()
    for name, data in files.items():
        put(folder, f"index/{name}", data)
    if d.rng.random() < 0.03:
        (folder / "index" / (name := d.rng.choice(list(files)))).unlink()
        d.rng.random() < 0.5 and (folder / "index" / name).mkdir()
    return folder / "index"


def _rows(path: Path, folder: Path) -> None:
    from prepare.command import split_by_question
    from prepare.rows import read_rows, row_query

    rows = read_rows(path)
    split_by_question(rows, 2, 0)
    for row in rows:
        row_query(row)


ROW = {"query": "a", "question": "b?", "answer": "c", "documents": "Doc 1: c", "quality": "useful"}
ASKED = 'answer the question: "b?" whose answer is c.\n\nQuery: a\nUseful Output:\n'
ROWS = [
    ROW | {"earlier": [["x", "y"]]},
    {"prompt": ASKED, "response": "Doc 1: c"},
    {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "Doc 1: c"}]},
    {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "Doc 1: c"}]},
    {"instruction": ASKED, "input": "", "output": "Doc 1: c"},
]


@target(10, _rows)
def rows(d: Damage, folder: Path) -> Path:
    some = d.rng.sample(ROWS, 3)
    return put(folder, "r.jsonl", d.lines(some) if d.rng.random() < 0.8 else d.dumped(d.json(some)))


def _traces(path: Path, folder: Path) -> None:
    from prepare.traces import example, parse_trace
    from rollout import Limits
    from search import read_lines
    from words import SHORT_WORDS

    for row in read_lines(path, parse_trace):
        if row:
            example(tokenizer(), SHORT_WORDS, Limits(), row)


@target(5, _traces)
def traces(d: Damage, folder: Path) -> Path:
    spans = [["sampled", "<search> a </search>"], ["documents", "Doc 1: b"], ["given", "x"]]
    trace = {"question": "a?", "golden_answers": ["b"], "f1": 1.0, "spans": spans}
    return put(folder, "t.jsonl", d.lines([{"flags": {"seed": 0}}, trace]))


def _prompts(path: Path, folder: Path) -> None:
    from rollout import Query, Question
    from rollout import prompt as asked
    from simulator import prompt
    from words import load_policy_words, load_words

    if path.name == "policy.json":
        asked(Question("q", ("a",)), tokenizer(), load_policy_words(path))
    else:
        query = Query("x", Question("q", ("a",)), earlier=(("u", "v"),))
        prompt(tokenizer(), load_words(path), query, False)


@target(6, _prompts)
def prompts(d: Damage, folder: Path) -> Path:
    if d.rng.random() < 0.5:
        words = {"prompt": "Q {question}", "notice": "!", "system": "s"}
        return put(folder, "policy.json", d.dumped(d.json(words)))
    words = {
        "system": "",
        "useful": "{query} {earlier}",
        "noisy": "{query}",
        "count": 5,
        "earlier": "{query}",
    }
    return put(folder, "sim.json", d.dumped(d.json(words)))


# ------------------------------------------------------------------------------------------------ checkpoints


@cache
def body() -> Path:
    """A random body, made once."""
    import torch

    from model import Config, Model
    from toy.make import BODY, write_tokenizer
    from weights import save_model

    torch.set_num_threads(1)
    path = Path(tempfile.mkdtemp())
    write_tokenizer(path)
    vocab = json.loads((path / "tokenizer.json").read_text())
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    small |= {
        "vocab_size": len(vocab["model"]["vocab"]) + len(vocab["added_tokens"]),
        "num_key_value_heads": 1,
    }
    save_model(Model(Config.from_hf(BODY | small)).init(0, 0.1), path)
    return path


@cache
def tokenizer():
    from tokenizer import Tokenizer

    return Tokenizer.load(body())


@cache
def adapter() -> Path:
    """An adapter for it, with its prompts."""
    import weights
    from model import POLICY

    model = weights.load(body())
    model.add_role(POLICY, 2, 4.0)
    path = Path(tempfile.mkdtemp())
    weights.save_adapter(model, POLICY, path, "tiny")
    return path


def _body(path: Path, folder: Path) -> None:
    import weights
    from cli import plan

    plan.shape(str(path))
    weights.load(path)


@target(6, _body)
def config(d: Damage, folder: Path) -> Path:
    shutil.copy(body() / "model.safetensors", folder)
    c = json.loads((body() / "config.json").read_text())
    if d.rng.random() < 0.3:
        c |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
    put(folder, "config.json", d.dumped(d.json(c)))
    return folder


@target(6, _body)
def weights_of_a_body(d: Damage, folder: Path) -> Path:
    shutil.copy(body() / "config.json", folder)
    data = (body() / "model.safetensors").read_bytes()
    if d.rng.random() < 0.3:
        shards = d.json({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
        put(folder, "model.safetensors.index.json", d.dumped(shards))
        put(folder, "one.safetensors", d.tensors(data))
    else:
        put(folder, "model.safetensors", d.tensors(data))
    return folder


def _adapter(path: Path, folder: Path) -> None:
    import torch

    import weights
    from cli.setting import rank_of
    from model import POLICY

    model = weights.load(body())
    rank_of(None, str(path))
    weights.load_adapter(model, POLICY, path)
    h = model(torch.zeros(1, 4, dtype=torch.long), POLICY)
    if not model.adapter(POLICY).isfinite().all():
        raise AssertionError("an adapter with NaN was loaded")
    del h


@target(6, _adapter)
def adapters(d: Damage, folder: Path) -> Path:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    chosen = d.rng.choice(names)
    for name in names:
        data = (adapter() / name).read_bytes()
        if name == chosen:
            data = d.tensors(data) if name.endswith("safetensors") else d.dumped(d.json(json.loads(data)))
        put(folder, name, data)
    return folder


def _tokenizer(path: Path, folder: Path) -> None:
    from tokenizer import Tokenizer

    tok = Tokenizer.load(path)
    ids = tok.chat([{"role": "user", "content": "Who wrote <|im_end|> Emma?"}])
    tok.decode(ids)


@target(2, _tokenizer)
def tokenizers(d: Damage, folder: Path) -> Path:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
    chosen = d.rng.choice(names[:2] * 3 + names)
    for name in names:
        if (body() / name).exists() or name == chosen:
            data = (body() / name).read_bytes() if (body() / name).exists() else b"{}"
            value = json.loads(data)
            if name == "tokenizer_config.json":
                value["chat_template"] = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
            put(folder, name, d.dumped(d.json(value)) if name == chosen else json.dumps(value).encode())
    return folder


PARTS = [
    *(
        "{% for m in messages %}",
        "{% for m in messages[::-1] %}",
        "{% endfor %}",
        "{{ m.content }}",
        "{{ m.role }}",
    ),
    *("{% for i in range(2) %}", "{% if m %}", "{% else %}", "{% endif %}", "{% set ns = namespace(a=0) %}"),
    *(
        "{% set ns.a = ns.a + 1 %}",
        "{{ ns.a }}",
        "{{ m['content'] | upper }}",
        "{{ m.content * 50 }}",
        "{{ 1 / 0 }}",
    ),
    *(
        "{{ messages }}",
        "{{ m.content.split('<')[0] }}",
        "{{ raise_exception('no') }}",
        "{% macro f(x) %}",
        "{{ f(f) }}",
    ),
    *("{% endmacro %}", "{{ strftime_now('%Y') }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}"),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__ }}",
        "{{ tools | tojson }}",
    ),
    *(
        "{{ m.content.format(m) }}",
        "{{ '{0.__class__}'.format(m) }}",
        "{% generation %}",
        "{% endgeneration %}",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "\n",
        "\ufdd0",
        "\ufdd00\ufdd0",
        "\ud800",
        "{{ bos_token }}",
        "{{ undefined.x }}",
    ),
    *(
        "{% break %}",
        "{% do 1 %}",
        "{{ messages.pop() }}",
        "{{ m.update({'content': 1}) }}",
        "{{ [m] | map('x') }}",
    ),
    *(
        "{{ range(99999) | join }}",
        "{% raw %}",
        "{% endraw %}",
        "{#",
        "#}",
        "{{",
        "%}",
        "{{ messages | length }}",
    ),
]
BLOCKS = ("for", "if", "macro", "generation", "raw")
CHATS = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>a\n",
    "{% if messages[0]['role'] == 'user' %}{{ messages[0]['content'] }}{% endif %}{{ messages[-1].content }}",
]


@target(4, _tokenizer)
def templates(d: Damage, folder: Path) -> Path:
    """A chat template, in a file of its own or among the settings: any program of its language."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        if (body() / name).exists():
            shutil.copy(body() / name, folder)
    text, at = d.rng.choice(CHATS), d.rng.randrange(3)
    parts = d.rng.choices(PARTS, k=d.rng.choice((1, 2, 3, 6)))
    if at == 0:  # as a rule, blocks are closed
        opened = [part.split()[1] for part in parts if part.split()[1:2] and part.split()[1] in BLOCKS]
        closed = "".join(f"{{% end{word} %}}" for word in reversed(opened))
        text = "".join(part for part in parts if "{% end" not in part) + closed * (d.rng.random() < 0.9)
    elif at == 1:
        a, b = sorted(d.rng.randrange(len(text) + 1) for _ in range(2))
        text = text[:a] + "".join(parts[:2]) + text[d.rng.choice((a, b)) :]
    else:
        text = d.text(text)
    if d.rng.random() < 0.4:
        data = text.encode("utf-8", "surrogatepass")
        put(folder, "chat_template.jinja", d.bytes(data) if d.rng.random() < 0.3 else data)
    else:
        settings = json.loads((body() / "tokenizer_config.json").read_text())
        given = d.rng.choice(
            (text, text, [{"name": "default", "template": text}], {"default": text}, d.value())
        )
        settings["chat_template"] = given
        put(folder, "tokenizer_config.json", d.dumped(settings))
    return folder


# ------------------------------------------------------------------------------------------ what runs leave


@cache
def state() -> bytes:
    """A state of a run."""
    import torch

    from cli.disk import save_state

    path = Path(tempfile.mkdtemp()) / "state.safetensors"
    tensors = {"policy": torch.ones(8), "optimizer.0.step": torch.tensor(3.0)}
    tensors |= {f"optimizer.0.{m}": torch.zeros(8) for m in ("exp_avg", "exp_avg_sq")}
    facts = {"step": 3, "updates": 3, "seconds": 1.0, "before": {}, "documents": {}, "simulator": {}}
    save_state(path, tensors, facts)
    return path.read_bytes()


def _state(path: Path, folder: Path) -> None:
    from types import SimpleNamespace

    import torch

    from train import restore

    p = torch.nn.Parameter(torch.ones(8))
    setting = SimpleNamespace(body=SimpleNamespace(adapter=lambda role: p, roles={}), bodies={})
    restore(SimpleNamespace(out=str(folder), steps=9), setting, torch.optim.AdamW([p]))


@target(6, _state)
def states(d: Damage, folder: Path) -> Path:
    return put(folder, "state.safetensors", d.tensors(state()))


ANSWERED = {
    "set": "nq",
    "id": "1",
    "question": "a?",
    "golden_answers": ["b"],
    "hops": 1,
    "answer": "b",
    "f1": 1.0,
}
ANSWERED |= {"end": "answer", "queries": ["a"], "em": 1.0, "cover_em": 1.0, "searches": 1, "found": 1.0}


def _kept_rows(path: Path, folder: Path) -> None:
    import eval
    from cli.disk import Rows
    from evaluation import report
    from rollout import Question

    for _ in range(2):  # what was read and appended to is read again
        log = Rows(path, {"seed": 0}, resume=True, key=lambda row: (row["set"], row["number"]))
        done = eval.answered_before(log, "nq", [Question("a?", ("b",), "1", 1)] * 3)
        rows = [log.rows["nq", number] for number in sorted(done)]
        assert len(rows) == len(done) <= 3
        if rows:
            report.results(report.figures(rows, 50), {})
        log.add({"set": "other", "number": 9})
        del log


@target(6, _kept_rows)
def kept_rows(d: Damage, folder: Path) -> Path:
    rows = [ANSWERED | {"number": number, "seconds": 0.5} for number in (0, 1)]
    return put(folder, "r.part", d.lines([{"flags": {"seed": 0}}, *rows]))


def _episodes(path: Path, folder: Path) -> None:
    from argparse import Namespace

    from cli.disk import Rows
    from prepare.collect import sort_rows
    from prepare.command import collected_before
    from prepare.rows import write_rows
    from rollout import Question

    log = Rows(path, {"seed": 0}, True, lambda row: row["episode"], must=True)
    asked = Namespace(judge="answer", rows=4)
    collected_before(log, [Question("a?", ("b",))] * 2, asked)
    write_rows(sort_rows(log.rows, "answer").rows(4), folder / "rows.jsonl")


@target(4, _episodes)
def episodes(d: Damage, folder: Path) -> Path:
    """The log of a collection that was cut."""
    labels = {"judge": None, "answer": True, "trajectory": False}
    one = {"query": "q", "question": "a?", "answer": "b", "documents": "Doc 1: b", "labels": labels}
    said = [["sampled", "<search> q </search>"], ["documents", "Doc 1: b"]]
    done = {"question": "a?", "golden_answers": ["b"], "f1": 1.0, "spans": said, "forced": False}
    rows = [done | {"episode": 0, "rows": [one]}]
    rows += [
        done | {"episode": 3, "rows": [one, one | {"documents": "x", "labels": labels | {"answer": False}}]}
    ]
    return put(folder, "rows.episodes", d.lines([{"flags": {"seed": 0}}, *rows]))


def _args(path: Path, folder: Path) -> None:
    from train import resumed

    resumed({"out": str(folder), "resume": True})


@target(4, _args)
def args(d: Damage, folder: Path) -> Path:
    value = json.loads((ROOT / "docs/seed0/args.json").read_text())
    return put(folder, "args.json", d.dumped(d.json(value)))


def _look(path: Path, folder: Path) -> None:
    import look

    look.DRAWS = 50  # resamples: they cost more than all else
    look.main([str(path), "--out", str(folder / "page.html")])


@cache
def run_of(name: str) -> list[dict]:
    """The first rows of a run, with a few of their episodes."""
    rows = [json.loads(line) for line in (ROOT / "docs/seed0" / name).read_text().splitlines()[:3]]
    for row in rows:
        if "groups" in row:
            row["groups"] = row["groups"][:2]
        if "held" in row:
            row["held"] = {way: part[:9] for way, part in row["held"].items()}
    return rows


@target(2, _look)
def looked_at(d: Damage, folder: Path) -> Path:
    chosen = d.rng.choice(["args.json", "log.jsonl", "episodes.jsonl"])
    value = json.loads((ROOT / "docs/seed0/args.json").read_text())
    put(folder, "args.json", d.dumped(d.json(value)) if chosen == "args.json" else json.dumps(value).encode())
    for name in ("log.jsonl", "episodes.jsonl"):
        plain = "".join(json.dumps(row) + "\n" for row in run_of(name)).encode()
        put(folder, name, d.lines(run_of(name)) if name == chosen else plain)
    return folder


RESULT = {
    "flags": {"seed": 0, "policy": "tiny"},
    "sets": {"nq": {"n": 1, "f1": 1.0, "intervals": {"f1": None}}},
}
RESULT |= {"questions": [ANSWERED, ANSWERED | {"id": "2", "f1": 0.0}]}


def _results(path: Path, folder: Path) -> None:
    import eval
    from evaluation import report

    report.compare.__defaults__ = (100,)  # draws
    _look(path, folder)
    eval.main(["--compare", str(path), str(path)])


@target(3, _results)
def results(d: Damage, folder: Path) -> Path:
    return put(folder, "result.json", d.dumped(d.json(RESULT)))


# ------------------------------------------------------------------------------------- the network, the model


def _answers(given: tuple, folder: Path) -> None:
    import search
    import servers
    from search import render

    status, data, which = given
    server = servers.Server("http://127.0.0.1:9", "a server", key="SECRET", limit=0.01)

    class Response:
        reason, headers = "why", {"Retry-After": "9"}

    Response.status = status
    server._exchange = lambda *_: (Response, data)
    read = [search.retrieved, search.organic, servers._said, servers._first_model][which]
    try:
        said = server.ask(read)
    except servers.ServerError as e:
        if "SECRET" in str(e) or len(str(e)) > 1000 or "\n" in str(e) or servers.UNSEEN.search(str(e)):
            raise AssertionError("an error shows what it must not") from None
        raise
    text = render(said) if isinstance(said, list) else said
    if servers.UNSEEN.search(text.replace("\n", "")) and which < 3:
        raise AssertionError("a control character in a document")


@target(12, _answers)
def answers(d: Damage, folder: Path) -> tuple:
    which = d.rng.randrange(4)
    passages = [
        {"document": {"contents": '"T"\ntext', "title": "T"}, "score": 1.0},
        {"contents": "a\nb"},
        "c\nd",
    ]
    choice = {"message": {"content": "Doc 1: SECRET"}, "finish_reason": "stop"}
    good = [
        {"result": [passages]},
        {"organic_results": [{"title": "t", "snippet": "s"}], "search_metadata": {"status": "Success"}},
        {"choices": [choice]},
        {"data": [{"id": "model"}]},
    ][which]
    return d.rng.choice((200, 200, 200, 200, 302, 404, 429, 500)), d.dumped(d.json(good)), which


def _said(text: str, folder: Path) -> None:
    from questions import cover_em, exact_match, f1
    from rollout import action, blocks, observation
    from search import split_documents

    turn = text[:20_000]  # a turn of the policy has a limit in tokens
    action(turn), list(blocks(turn)), f1(text, (text, "x")), cover_em(text, ("x",)), exact_match(text, ("x",))
    split_documents(text)
    ids = tokenizer().encode(text)
    if len(observation(tokenizer(), text, 64)) > 64 or any(i in tokenizer().eos for i in ids):
        raise AssertionError("a text became a special token, or too long an observation")


PIECES = [
    *(
        "<think>",
        "</think>",
        "<search>",
        "</search>",
        "<answer>",
        "</answer>",
        "<information>",
        "</information>",
    ),
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<|endoftext|>",
        "Doc 1: ",
        "Doc 99999999: ",
        "\n",
        "\r",
        "\u2028",
        "a",
        " ",
    ),
    *("{question}", "\ud800", "\u202e", "\x1b[2J", "\0", "\ufdd0", "x" * 300, "e\u0301" * 50),
]


@target(12, _said)
def said(d: Damage, folder: Path) -> str:
    text = "".join(d.rng.choices(PIECES, k=d.rng.choice((1, 5, 20, 200))))
    return (text * 3000)[: 2**20] if d.rng.random() < 0.001 else text


def _command(argv: tuple[str, list[str]], folder: Path) -> None:
    import search
    from cli import flags

    command, words = argv
    if command == "search":
        from cli.parser import parse

        parse("", search.FLAGS, words)
    elif command == "simulator":
        verb, given = flags.given_to_verb("", words)
        flags.settle(verb, given)
    else:
        flags.settle(command, flags.given_to(command, "", words))


@target(12, _command)
def commands(d: Damage, folder: Path) -> tuple[str, list[str]]:
    from cli import flags

    command = d.rng.choice(("train", "train", "eval", "cold", "simulator", "search"))
    verb = d.rng.choice(("collect", "sft", "audit", "write"))
    known = flags.flags_of(verb if command == "simulator" else command) if command != "search" else []
    words = [verb] if command == "simulator" and d.rng.random() < 0.95 else []
    for flag in d.rng.sample(known, min(len(known), d.rng.randrange(6))):
        words.append(d.rng.choice((f"--{flag.name}",) * 5 + (f"--{flag.name[:-1]}", flag.name)))
        good = [str(flag.default)] + (list(flag.kind) if isinstance(flag.kind, tuple) else ["7", "0.5"])
        words += [] if flag.kind is bool else [str(d.rng.choice((*good, d.value())))]
    words += [str(d.value())] * (d.rng.random() < 0.1)
    return command, [w.encode("utf-8", "replace").decode() for w in words]


# The inputs of the long part: cheap formats have more.
LONG = {"questions": 12_000, "corpus": 10_000, "rows": 12_000, "traces": 8_000, "prompts": 8_000}
LONG |= {
    "answers": 15_000,
    "said": 8_000,
    "commands": 8_000,
    "kept_rows": 5_000,
    "episodes": 5_000,
    "args": 3_000,
}
LONG |= {"config": 3_000, "weights_of_a_body": 2_000, "adapters": 3_000, "states": 2_000, "parquet": 1_000}
LONG |= {"looked_at": 3_000, "results": 3_000, "tokenizers": 3_000, "templates": 3_000, "indexes": 4_000}

# ------------------------------------------------------------------------------------------------ the running


def tried(name: str, i: int, show: bool = False, damage: Damage | None = None) -> str:
    """Make and judge the i-th input of a target, or the one of another damage."""
    t, folder = TARGETS[name], Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        given = t.make(damage or Damage(f"{name} {i}"), folder)
        if show:
            print(name, i, given if not isinstance(given, Path) else sorted(folder.rglob("*")))
            for path in sorted(folder.rglob("*")):
                print(path.name, path.read_bytes()[:1500])
        return judged(lambda: t.use(given, folder), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def warm() -> None:
    """Import and make what inputs share, before anything is limited or watched."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch

    import look  # noqa: F401
    import train  # noqa: F401

    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports half of torch
    tokenizer(), adapter(), state(), index(), bomb(b" "), bomb(b"9"), bomb(b"[")
    for name in TARGETS:
        quiet(partial(tried, name, 0))


def quiet(run: Callable):
    """Run with stdout and stderr away: argparse and look print."""
    import contextlib
    import os

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return run()


def fuzzed(name: str, start: int, count: int) -> Iterator[tuple[int, str]]:
    """(i, what was wrong) of the inputs of a target; "" and "refused" are right."""
    yield from watched(lambda i: quiet(partial(tried, name, i)), start, start + count)


def quick(count: int = 2000) -> tuple[Counter, list[str]]:
    """A few inputs of each target -> how many were read, refused, and wrong; what was wrong."""
    warm()
    counts, wrong, all_shares = Counter(), [], sum(t.share for t in TARGETS.values())
    for name, t in TARGETS.items():
        for i, said in fuzzed(name, 0, count * t.share // all_shares + 1):
            kind = said if said in ("", "refused") else "wrong"
            counts[kind or "read"] += 1
            if kind == "wrong":
                wrong.append(f"{name} {i}: {said}")
    return counts, wrong


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="", choices=["", *TARGETS])
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--show", action="store_true")
    a = parser.parse_args(argv)
    if a.show:
        print(tried(a.target, a.start, show=True))
        return
    if a.target:
        warm()
        results = list(fuzzed(a.target, a.start, a.count))
        wrong = [f"{a.target} {i}: {said}" for i, said in results if said not in ("", "refused")]
        counts = Counter(said if said in ("", "refused") else "wrong" for _, said in results)
    else:
        counts, wrong = quick(a.count)
    print(dict(counts), *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
