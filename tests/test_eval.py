"""Whole evaluations: modes, sets, what is kept of a run that is cut, one episode live, the command line.

The engine is scripted where the story counts, and a small random network where the command line does.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import random_body
from test_collect import Letters

import eval as evaluation
import model as models
import weights
from cli import screen
from cli.disk import Rows
from engine import Engine, Stats
from eval import evaluate, retrieval, summarise
from evaluation.live import Screen, live
from evaluation.modes import MODES
from rollout import Documents, Limits, Question, Sampled, Turn, episode
from search import index
from tokenizer import Tokenizer
from toy import words as toy
from toy.world import World
from words import MODE_WORDS, Words


def lines_file(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


class Script:
    """An engine whose policy says what the script has for a question, turn by turn."""

    def __init__(self, script):
        self.script, self.temperatures, self.addresses = script, set(), []

    def run(self, generators, tell=None):
        results = []
        for generator in generators:
            results.append(self.play(generator))
            if tell:
                tell(len(results), len(self.script), Stats(seconds=1.0))
        return results

    def play(self, generator):
        turn, said = next(generator), 0
        lines = next(v for k, v in self.script.items() if k in Letters().decode(turn.ids))
        try:
            while True:
                self.temperatures.add(turn.temperature)
                self.addresses.append(turn.address[:5])
                ids = [ord(c) for c in lines[min(said, len(lines) - 1)]]
                said += 1
                turn = generator.send(Sampled(ids, [0.0] * len(ids), "stop"))
        except StopIteration as end:
            return end.value


def library(query):
    """A real engine that holds Peru's capital and nothing else."""
    return Documents("Doc 1: Lima is the capital of Peru." if "Peru" in query.text else "")
    yield


QUESTIONS = [
    Question("capital of Peru?", ("Lima",), "a", 1),
    Question("mayor of the capital of Peru?", ("Rafael",), "b", 2),
    Question("colour of nothing?", ("no colour", "none"), "c", 2),
]
SCRIPT = {
    "Q: capital of Peru": ["<search>Peru</search>", "<answer>Lima, I think</answer>"],
    "mayor": ["<search>Peru</search>", "<search>Lima</search>", "<answer>rafael</answer>"],
    "colour": ["I do not know"],
}
WORDS = Words("Q: {question}\n", "\n(use the tags)\n")
LIMITS = Limits(prompt=100, episode=2000, turn=200, observation=200, turns=3)


def test_evaluate_counts_every_question_once():
    """Defects 4 and 10: an episode without an answer crashed the scorer, the last batch was dropped, and
    evaluation sampled at temperature 1."""
    engine, told = Script(SCRIPT), []
    summary, trajectories = evaluate(
        engine,
        evaluation.episodes(Letters(), QUESTIONS, library, LIMITS, WORDS),
        lambda *a: told.append(a[:2]),
    )
    assert [t.question for t in trajectories] == QUESTIONS
    assert [t.answer for t in trajectories] == ["Lima, I think", "rafael", None]
    assert engine.temperatures == {0.0}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert summary == {
        "n": 3,
        "f1": pytest.approx((0.5 + 1 + 0) / 3),
        "em": pytest.approx(1 / 3),
        "cover_em": pytest.approx(2 / 3),
        "searches": pytest.approx(3 / 3),
        "found": pytest.approx(1 / 3),
        "ends": {"answer": 2, "turns": 1},
        "by_hop": {
            "1": {"n": 1, "f1": 0.5, "em": 0.0, "cover_em": 1.0, "searches": 1.0, "found": 1.0},
            "2": {"n": 2, "f1": 0.5, "em": 0.5, "cover_em": 0.5, "searches": 1.0, "found": 0.0},
        },
    }


def test_every_question_has_its_own_random_numbers():
    """Questions at one address would draw the same tokens and the same noise: a sample of one, 500 times."""
    engine = Script(SCRIPT)
    evaluate(engine, evaluation.episodes(Letters(), QUESTIONS, library, LIMITS, WORDS, 1.0, (7, 9)))
    calls = {0: 2, 1: 3, 2: 4}  # turns of each question
    assert engine.addresses == [(7, 9, i, 0, call) for i, n in calls.items() for call in range(n)]
    assert engine.temperatures == {1.0}


def test_yes_and_no_are_found_nowhere():
    """The letters "no" stand in "another", "yes" hardly anywhere: such questions say nothing of an engine."""
    yes_no = Question("is Peru in Asia?", ("no", "No."), "d")
    script = SCRIPT | {"Asia": ["<search>Peru</search>", "<answer>no</answer>"]}

    def another(query):
        return Documents("Doc 1: another")
        yield

    summary, _ = evaluate(
        Script(script), evaluation.episodes(Letters(), [yes_no, QUESTIONS[0]], another, LIMITS, WORDS)
    )
    assert (summary["n"], summary["em"], summary["found"]) == (2, 0.5, 0.0)
    summary, _ = evaluate(Script(script), evaluation.episodes(Letters(), [yes_no], another, LIMITS, WORDS))
    assert summary["found"] is None
    made = index([("Peru", "is in another place"), ("Lima", "the capital of Peru")])
    figures = retrieval(made, [yes_no, QUESTIONS[0]], depths=(2,))
    assert (figures["n"], figures["top 2"]) == (1, 1.0)
    assert retrieval(made, [yes_no], depths=(2,)) == {"n": 0, "top 2": None, "ms": None}


# ------------------------------------------------------------------------------------------------------ modes


def play(mode, says, search=library, question=QUESTIONS[0], limits=LIMITS, words=None):
    """One episode in a mode, with what the policy says turn by turn. Returns the trajectory and its turns."""
    tok, turns, value, said = Letters(), [], None, iter(says)
    run = MODES[mode](question, search, tok, limits, words or MODE_SHORT[mode], 0.0, (1, 2, 3, 4))
    while True:
        try:
            turns.append(run.send(value))
        except StopIteration as end:
            return end.value, turns
        ids = tok.encode(next(said))
        value = Sampled(ids, [-0.5] * len(ids), "eos" if ids[-1] == 0 else "stop")


def never(query):
    raise AssertionError("this mode must not search")
    yield


MODE_SHORT = dict.fromkeys(MODES, WORDS) | {"rag": Words("[{documents}] Q: {question}\n", "")}


def sampled_text(t):
    return Letters().decode([i for i, m in zip(t.ids, t.mask) if m])


def test_a_direct_answer_is_one_turn_without_a_search():
    """A baseline that searched, or lost its answer for a tag that it left out, would flatter the agent."""
    t, turns = play("direct", ["Lima</answer>"], never)
    assert Letters().decode(turns[0].ids) == "Q: capital of Peru?\n<answer>" and len(turns) == 1
    assert (t.answer, t.end, t.searches) == ("Lima", "answer", [])
    assert sampled_text(t) == "Lima</answer>" and t.logps[-1] == -0.5
    assert turns[0].stops == ("</answer>",) and turns[0].address[:4] == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "said, answer",
    [
        ("Lima</answer>", "Lima"),
        (" \n Lima \nbecause it is</answer>", "Lima"),
        ("Lima\0", "Lima"),
        ("Lima, which is the", "Lima, which is the"),
        ("</answer>", None),
        ("\n\0", None),
    ],
)
def test_a_baselines_answer_is_its_first_line(said, answer):
    """Base models go on and on, instruct models end their turn: neither is a part of the answer."""
    t, _ = play("direct", [said], never)
    assert (t.answer, t.end) == (answer, "answer" if answer else "turns")


def test_a_chain_of_thought_ends_in_an_answer():
    """Without the second turn a thought that ends, or runs to its limit, would count as no answer."""
    for thought, given in (("hm</think>", "\n<answer>"), ("hm, hm", "</think>\n<answer>")):
        t, turns = play("cot", [thought, "Lima</answer>"], never)
        assert Letters().decode(turns[0].ids).endswith("\n<think>") and t.answer == "Lima"
        assert Letters().decode(turns[1].ids) == given and sampled_text(t) == thought + "Lima</answer>"
    t, turns = play("cot", ["hm <answer>Lima</answer>"], never)
    assert (t.answer, t.end, len(turns)) == ("Lima", "answer", 1)
    t, turns = play("cot", ["hm <answer></answer>", "Lima</answer>"], never)
    assert t.answer == "Lima"


def test_rag_searches_once_with_the_question():
    """The baseline's documents come from the chosen engine, before the policy says anything."""
    t, turns = play("rag", ["Lima</answer>"])
    query = t.searches[0][0]
    assert len(t.searches) == 1
    assert (query.text, query.question, query.address) == ("capital of Peru?", QUESTIONS[0], (1, 2, 3, 4, 0))
    asked = "[Doc 1: Lima is the capital of Peru.] Q: capital of Peru?\n<answer>"
    assert Letters().decode(turns[0].ids) == asked and sampled_text(t) == "Lima</answer>"
    assert summarise([t])["found"] == 1.0


def test_rag_cuts_documents_and_not_the_question():
    """Five long passages would push question or answer out of the episode."""

    def long(query):
        return Documents("x" * 5000)
        yield

    for tokens in (120, 200, 400):
        limits = Limits(prompt=60, episode=tokens, turn=20, observation=200)
        _, turns = play("rag", ["Lima</answer>"], long, limits=limits)
        text = Letters().decode(turns[0].ids)
        assert text.startswith("[xx") and text.endswith("] Q: capital of Peru?\n<answer>")
        assert turns[0].limit == 20 and len(turns[0].ids) + 20 <= tokens and text.count("x") <= 200
    with pytest.raises(ValueError, match="tokens, over 20"):
        play("rag", [], limits=Limits(prompt=20))


def test_every_mode_asks_for_what_it_needs():
    """Words without their place would send the same prompt for every question."""
    assert MODE_WORDS.keys() == MODES.keys()
    assert all(words.prompt.count("{question}") == 1 for words in MODE_WORDS.values())
    assert [m for m, words in MODE_WORDS.items() if "{documents}" in words.prompt] == ["rag"]


def test_retrieval_measures_the_engine_alone():
    """A miss of the engine must show as its own, not as the policy's."""
    passages = [("Lima", "the capital of Peru"), ("Quito", "the capital of Ecuador"), ("Rafael", "a mayor")]
    questions = [
        Question("capital of Ecuador", ("quito",)),
        Question("capital", ("Ecuador",)),  # a tie: the second passage
        Question("unheard of", ("Rafael",)),
    ]
    figures = retrieval(index(passages), questions, depths=(1, 2))
    assert figures.pop("ms") > 0
    assert figures == {"n": 3, "top 1": pytest.approx(1 / 3), "top 2": pytest.approx(2 / 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random body with the toy world's tokenizer: it answers nothing, so every figure is known."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    rest = {"intermediate_size": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    config = {"model_type": "qwen2", "tie_word_embeddings": True} | shape | rest
    return str(random_body(tmp_path_factory.mktemp("body"), config, 0))


CORPUS_ROWS = [{"title": "Lima", "contents": "Lima is the capital of Peru."}]


def test_the_command_line_scores_a_checkpoint(checkpoint, tmp_path, capsys):
    """The flags and the names in the JSON file are what other programs rely on."""
    rows = [{"id": str(i), "question": f"q{i}", "answer": "Lima", "hops": 1 + i % 2} for i in range(5)]
    data, corpus = lines_file(tmp_path / "q.jsonl", *rows), lines_file(tmp_path / "c.jsonl", *CORPUS_ROWS)
    prompt = lines_file(tmp_path / "words.json", {"prompt": "{question}", "notice": " "})
    body = weights.load(checkpoint)
    body.add_role(models.POLICY, 2, 4.0, 0)
    weights.save_adapter(body, models.POLICY, tmp_path / "adapter")
    out = tmp_path / "out.json"
    flags = (
        f"--policy {checkpoint} --adapter {tmp_path}/adapter --data {data} --limit 4 --json {out} --seats 3"
    )
    flags += f" --search bm25:{corpus} --episode-tokens 200 --turns 1 --policy-prompt {prompt} --device cpu"
    evaluation.main(flags.split())
    result = json.loads(out.read_text())
    want = {"n": 4, "f1": 0.0, "em": 0.0, "cover_em": 0.0, "searches": 0.0}
    assert {k: result[k] for k in want} == want
    assert sum(result["ends"].values()) == 4 and set(result["by_hop"]) == {"1", "2"}
    assert [q["id"] for q in result["questions"]] == ["0", "1", "3", "4"]  # drawn, in order
    assert result["flags"]["limit"] == 4 and set(result["sets"]) == {"q"}
    assert capsys.readouterr().out.split()[:2] == ["n", "f1"]


@pytest.mark.parametrize("engine", ["toy", "none", "sim"])
def test_the_toy_world_needs_no_file(checkpoint, capsys, engine):
    """The embedded default: each engine answers the toy world's questions with nothing else on the disk."""
    flags = f"--policy {checkpoint} --search {engine} --limit 3 --device cpu"
    evaluation.main(flags.split())
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["toy", "3"]


@pytest.mark.parametrize(
    "mode, engine", [("direct", ""), ("cot", ""), ("rag", "--search toy"), ("rag", "--search sim")]
)
def test_every_mode_runs_in_the_toy_world(checkpoint, capsys, mode, engine):
    """Modes share the engine, the limits and the words of the toy world with the agent."""
    evaluation.main(f"--policy {checkpoint} --mode {mode} {engine} --limit 3 --seats 4 --device cpu".split())
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:2] == ["toy", "3"]
    assert line[8] == ("1.000" if mode == "rag" else "0.000")  # searches


def cut_after(n, monkeypatch):
    """Ctrl-C as soon as n more questions are answered."""
    add = Rows.add

    def cut(self, *row):
        add(self, *row)
        if len(self.rows) == n:
            raise KeyboardInterrupt

    monkeypatch.setattr(Rows, "add", cut)


def test_a_run_that_is_cut_goes_on_to_the_same_answers(checkpoint, tmp_path, monkeypatch, capsys):
    """3,500 questions take a 3B body hours: a cut must cost none that was answered, and change no answer, not
    even a sampled one."""
    rows = [{"id": i, "question": f"home {i}", "answer": "Lima"} for i in range(6)]
    data = [str(lines_file(tmp_path / f"{name}.jsonl", *rows)) for name in ("p", "q")]
    flags = f"--policy {checkpoint} --search toy --data {','.join(data)} --temperature 1 --device cpu".split()
    evaluation.main([*flags, "--seats", "3", "--json", str(tmp_path / "whole.json")])
    cut = [*flags, "--json", str(tmp_path / "cut.json")]
    with monkeypatch.context() as patch:
        cut_after(8, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluation.main([*cut, "--seats", "2"])
    assert not (tmp_path / "cut.json").exists()
    with pytest.raises(ValueError, match="--resume"):
        evaluation.main(cut)
    bars, bar = [], screen.bar
    monkeypatch.setattr(screen, "bar", lambda *a: bars.append(a[1:]) or bar(*a))
    evaluation.main([*cut, "--seats", "5", "--resume"])
    assert bars == [(6, "questions", 6), (6, "questions", 2)]  # of q's 6, 2 were there
    whole, resumed = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "cut"))
    timeless = [[{**row, "seconds": 0} for row in r["questions"]] for r in (whole, resumed)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 12
    assert whole["sets"]["q"]["intervals"] == resumed["sets"]["q"]["intervals"]
    assert sorted(p.name for p in tmp_path.glob("cut*")) == ["cut.json"]


class Place(ThreadingHTTPServer):
    """A /retrieve server and an OpenAI-compatible one. After `healthy` requests it refuses all others."""

    def __init__(self, healthy=1000):
        self.seen, self.healthy = [], healthy
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": "m"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(asked)
        passage = {"document": {"contents": '"Lima"\nLima it is'}, "score": 1.0}
        message = {"message": {"content": "Doc 1: Lima it is"}}
        self.answer({"result": [[passage]]} if "queries" in asked else {"choices": [message]})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200 if len(self.server.seen) <= self.server.healthy else 403)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def place():
    """The server, closed after the test."""
    server = Place()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("engine", ["--search ADDRESS", "--search sim --sim ADDRESS/v1"])
def test_a_server_that_fails_costs_no_answer(checkpoint, tmp_path, place, engine):
    """Real engines fail in the middle of the night: one clear error, nothing of it in any answer, the rest
    on the next morning. The simulator may be such a server too."""
    out, data = tmp_path / "out.json", [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for path in data:
        lines_file(path, *[{"question": f"{path.stem} {i}", "answer": "Lima"} for i in range(5)])
    lines_file(tmp_path / "words.json", {"prompt": "{documents}{question}", "notice": ""})
    flags = f"--policy {checkpoint} --mode rag --data {data[0]},{data[1]} --json {out} --seats 2 --device cpu"
    flags += f" --resume --turn-tokens 9 --episode-tokens 500 --policy-prompt {tmp_path}/words.json {engine}"
    flags = flags.replace("ADDRESS", place.address).split()
    place.healthy = 5
    with pytest.raises(OSError, match=place.address):
        evaluation.main(flags)
    assert not out.exists()
    place.healthy = 1000
    evaluation.main(flags)
    result = json.loads(out.read_text())
    assert [q["question"] for q in result["questions"]] == [f"{p.stem} {i}" for p in data for i in range(5)]
    assert result["found"] == result["searches"] == 1.0  # of documents that came, each time, from the server
    assert sum("first" in json.dumps(asked) for asked in place.seen) == 5  # and none was asked for again


def test_two_results_are_compared_at_the_command_line(tmp_path, capsys):
    """A run against itself differs by nothing, and says so."""
    row = {"set": "q", "id": "1", "question": "who?", "f1": 0.5, "em": 0.0, "cover_em": 1.0}
    (tmp_path / "a.json").write_text(json.dumps({"questions": [row]}))
    evaluation.main(["--compare", f"{tmp_path}/a.json", f"{tmp_path}/a.json"])
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *("q", "f1", "1", "0.500", "0.500", "+0.000"), *("-", "1.0000")
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- live


@pytest.mark.parametrize("name", ["tiny", "random"])
def test_an_episode_live_is_the_episode(checkpoint, name):
    """Asked for token by token, an episode must not change: not its ids, its mask, its ends, nor what is fed
    (a turn that was fed again would cost its whole history). The random body never finds a tag."""
    home = weights.resolve({"tiny": "tiny", "random": checkpoint}[name])
    tok, world, shown = Tokenizer.load(home), World(1), []
    limits = Limits(prompt=16, episode=192, turn=20, observation=32, turns=4)
    engine = Engine({models.POLICY: (weights.load(home), tok)}, 4, limits.episode + 1)

    def runs():
        return evaluation.episodes(tok, world.questions(8), world.lookup, limits, toy.WORDS)

    plain, fed = engine.run(runs()), engine.stats.prefilled
    told = engine.run([live(run, tok, lambda ids, sampled: shown.append((ids, sampled))) for run in runs()])
    assert {t.end for t in plain} == {"answer" if name == "tiny" else "turns"}
    for a, b in zip(plain, told):
        assert (a.ids, a.mask, a.end, a.answer) == (b.ids, b.mask, b.end, b.answer)
        assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert engine.stats.prefilled == fed
    assert all(len(ids) == 1 for ids, sampled in shown if sampled)
    assert sum(len(ids) for ids, _ in shown) == sum(len(t.ids) for t in told)


def test_a_search_passes_through_a_live_episode():
    """A simulator's turn belongs to the engine as a whole: it is not the policy's text."""
    written, shown = Turn([7], models.SIMULATOR, 9, 0.8, (), (0,)), []

    def writer(query):
        return Documents((yield written))

    run = live(
        episode(QUESTIONS[0], writer, Letters(), LIMITS, WORDS, 0.0), Letters(), lambda *a: shown.append(a)
    )
    turn = next(run)
    for c in "<search>a</search>":
        assert turn.limit == 1 and turn is not written
        turn = run.send(Sampled([ord(c)], [0.0], "limit"))
    assert turn is written
    given = len(shown)
    turn = run.send("Doc 1: b")
    assert len(shown) == given + 1 and "Doc 1: b" in Letters().decode(shown[-1][0]) and not shown[-1][1]


class Bytes:
    """A tokenizer of one token a byte."""

    def token_bytes(self, i):
        return bytes([i])


def screened(pieces, colour):
    out = []
    screen = Screen(Bytes(), out.append, colour)
    for text, sampled in pieces:
        data = text if isinstance(text, bytes) else text.encode()
        for i in data if sampled else [data]:
            screen.show([i] if sampled else list(i), sampled)
    screen.end()
    return "".join(out)


def test_characters_that_tokens_cut_are_shown_whole():
    """Printing each token by itself turns every letter beyond ASCII into two or three question marks."""
    assert screened([("Łódź?\n", False), ("東京 \U0001f600", True)], False) == "[Łódź?\n]東京 \U0001f600"
    assert screened([("a", False), ("東".encode()[:2], True), ("b", False)], False) == "[a]\ufffd[b]"


def test_sampled_and_given_text_differ_in_colour():
    """Green is sampled, grey is given."""
    shown = screened([("Q", False), ("A", True)], True)
    assert shown == "\033[90mQ\033[0m\033[32mA\033[0m"


def test_no_text_steers_the_terminal():
    """A document with escape sequences could clear the screen, or paint itself as an answer."""
    shown = screened([("a\033[2J\r\x9b31m\ttab\n", False), ("\x07b\x7f", True)], False)
    assert shown == "[a\ufffd[2J\ufffd\ufffd31m\ttab\n]\ufffdb\ufffd"


@pytest.mark.parametrize(
    "flags", ["", "--policy tiny --search toy", "--mode direct", "--search sim --answer blue"]
)
def test_a_question_is_asked_live(capsys, flags):
    """The first thing that anyone tries: it needs no file, no flag, and ends in the answer."""
    asked = "which colour, pray, is the home of the mayor of Balan?"  # longer than any of its own questions
    evaluation.main([*flags.split(), "--ask", asked, "--device", "cpu"])
    text = capsys.readouterr().out
    assert text.startswith(f"[Question: {asked}\n") and "\033" not in text
    answer = text.splitlines()[-1]
    assert answer == "(no answer)" or f"{answer}</answer>" in text
    assert "tokens sampled in" in text.splitlines()[-2]


def test_colour_is_for_terminals_that_want_it(monkeypatch, capsys):
    """Escape codes in a file, or where NO_COLOR forbids them, are garbage."""
    seen = []
    for terminal, no_color in ((True, ""), (True, "1"), (False, "")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("NO_COLOR", no_color)
        evaluation.main(["--ask", "home Balan", "--mode", "direct", "--device", "cpu"])
        seen.append("\033[32m" in capsys.readouterr().out)
    assert seen == [True, False, False]


def test_without_a_policy_the_engine_is_measured(tmp_path, capsys):
    """The share of answers found is the acceptance figure of an engine: it must need no checkpoint."""
    data = lines_file(tmp_path / "q.jsonl", {"question": "capital of Peru", "answer": "lima"})
    corpus = lines_file(tmp_path / "c.jsonl", *CORPUS_ROWS)
    evaluation.main(["--data", str(data), "--search", f"bm25:{corpus}"])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["q", "1", "1.000"]


@pytest.mark.parametrize(
    "flags, what",
    [
        ("--search none", "needs a --policy"),
        ("--policy X", "--search is missing"),
        ("--policy X --ask q", "--search is missing"),
        ("--ask q --mode direct --search toy", "does not search"),
        ("--ask", "needs a question"),
        ("--ask q --search sim", "give --answer"),
        ("--policy X --search none --resume", "give both"),
        ("--policy X --search sim --sim http://127.0.0.1:1/v1 --sim-adapter D", "cannot be sent to a server"),
        ("--policy X --search none --turn-tokens 0", "--turn-tokens must be at least 1"),
        ("--policy X --search none --data D --mode rag --policy-prompt W", "where the {documents} go"),
        ("--policy X --search google", "unknown search engine"),
        ("--policy X --search none --noise .5", "--noise is for"),
        ("--policy X --search toy --noise 1.5", "within 0..1"),
        ("--policy X --search none --sim X", "are for --search sim"),
        ("--policy X --search none --limit 0", "--limit must be at least 1"),
        ("--policy X --search none --seats 0", "--seats must be at least 1"),
        ("--policy X --search none --turns -1", "--turns must be at least 0"),
        ("--policy X --search none --json absent/x.json", "directory that exists"),
        ("--policy X --search none --data absent.jsonl", "absent.jsonl"),
        ("--policy absent --search none", "absent"),
        ("--policy X --search none --adapter absent", "absent"),
        ("--policy X --search none --data D,D", "names q twice"),
        ("--policy X --search none --data D --policy-prompt D", "must hold prompt and notice"),
        ("--policy X --search none --data D --episode-tokens 2", "the prompt of question"),
        ("--policy X --search none --data D --episode-tokens 9999", "longer than"),
    ],
)
def test_bad_flags_are_one_clear_line(checkpoint, tmp_path, flags, what):
    """Each would else end in a traceback, or in a figure of something else than was asked for."""
    data = lines_file(tmp_path / "q.jsonl", {"question": "Capital of Peru?", "answer": "Lima"})
    prompt = lines_file(tmp_path / "words.json", {"prompt": "{question}", "notice": " "})
    files = {"X": checkpoint, "D": str(data), "D,D": f"{data},{data}", "W": str(prompt)}
    words = [files.get(w, w) for w in flags.split()] + [" "] * (flags == "--ask")
    with pytest.raises((ValueError, OSError)) as error:
        evaluation.main([*words, "--device", "cpu"])
    assert what in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_flag_is_one_line_and_exit_code_2(capsys):
    """argparse's own three lines of usage hide the one that matters."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--search", "none", "--polcy", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
