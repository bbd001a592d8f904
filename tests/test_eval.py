"""Whole evaluations: modes, sets, what is kept of a run that is cut, one episode live, the command line.

The engine is scripted where the story counts, and a small random network where the command line does.
"""

import json

import pytest

import eval as evaluation
import model as models
import toy
from eval import evaluate, retrieval
from rollout import Documents, Limits, Question, Sampled, Stats, Words
from search import BM25


def lines_file(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


class Letters:
    """A tokenizer of one token a character; token 0 ends a turn."""

    eos = frozenset({0})

    def encode(self, text, special=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def chat(self, messages):
        return self.encode("".join(m["content"] for m in messages))


class Script:
    """An engine whose policy says what the script has for a question, turn by turn."""

    def __init__(self, script):
        self.script, self.temperatures = script, set()

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
        engine, Letters(), QUESTIONS, library, LIMITS, WORDS, tell=lambda *a: told.append(a[:2])
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


def test_retrieval_measures_the_engine_alone():
    """A miss of the engine must show as its own, not as the policy's."""
    passages = [("Lima", "the capital of Peru"), ("Quito", "the capital of Ecuador"), ("Rafael", "a mayor")]
    questions = [
        Question("capital of Ecuador", ("quito",)),
        Question("capital", ("Ecuador",)),  # a tie: the second passage
        Question("unheard of", ("Rafael",)),
    ]
    figures = retrieval(BM25(passages), questions, depths=(1, 2))
    assert figures.pop("ms") > 0
    assert figures == {"n": 3, "top 1": pytest.approx(1 / 3), "top 2": pytest.approx(2 / 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random body with the toy world's tokenizer: it answers nothing, so every figure is known."""
    path = tmp_path_factory.mktemp("body")
    toy.write_tokenizer(path)
    vocabulary = json.loads((path / "tokenizer.json").read_text())
    size = len(vocabulary["model"]["vocab"]) + len(vocabulary["added_tokens"])
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    rest = {"intermediate_size": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    config = {"model_type": "qwen2", "vocab_size": size, "tie_word_embeddings": True} | shape | rest
    models.save_model(models.Model(models.Config.from_hf(config)).init(0), path)
    return str(path)


CORPUS_ROWS = [{"title": "Lima", "contents": "Lima is the capital of Peru."}]


def test_the_command_line_scores_a_checkpoint(checkpoint, tmp_path, capsys):
    """The flags and the names in the JSON file are what other programs rely on."""
    rows = [{"id": str(i), "question": f"q{i}", "answer": "Lima", "hops": 1 + i % 2} for i in range(5)]
    data, corpus = lines_file(tmp_path / "q.jsonl", *rows), lines_file(tmp_path / "c.jsonl", *CORPUS_ROWS)
    prompt = lines_file(tmp_path / "words.json", {"prompt": "{question}", "notice": " "})
    body = models.load(checkpoint)
    body.add_role(models.POLICY, 2, 4.0, 0)
    models.save_adapter(body, models.POLICY, tmp_path / "adapter")
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
    flags = f"--policy {checkpoint} --search {engine} --limit 3 --seats 4 --device cpu"
    evaluation.main(flags.split())
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["toy", "3"]


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
    words = [{"X": checkpoint, "D": str(data), "D,D": f"{data},{data}"}.get(w, w) for w in flags.split()]
    with pytest.raises((ValueError, OSError)) as error:
        evaluation.main([*words, "--device", "cpu"])
    assert what in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_flag_is_one_line_and_exit_code_2(capsys):
    """argparse's own three lines of usage hide the one that matters."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--search", "none", "--polcy", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
