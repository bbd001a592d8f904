"""The page of a run: what runs keep for it, what it says, and how it fares in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import look
import train
import weights
from evaluation import kept
from evaluation.kept import TOKENS, Kept
from rollout import Documents, Query, Question, Trajectory
from tokenizer import Tokenizer
from toy import texts
from toy.make import write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EVIL = "<script>document.title = 'hacked'</script></script><img src=x onerror=\"document.title = 'hacked'\">"
EVIL += "\u202eright to left\u202c ]]> {{ 7 * 7 }} &amp; </pre>" + "x" * 10_000


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return Tokenizer.load(path)


def episode(tok, question, documents="Doc 1: mayor Kalan Bato", answer="Bato", searches=1, noisy=False):
    """An episode that searches and answers, with log-probs of its own."""
    t = Trajectory(question)
    t.add(tok.encode(f"<information> Bato: {question.text}\n"))  # a prompt may name the tag
    for _ in range(searches):
        t.add(said := tok.encode("<search> mayor Kalan</search>"), [-0.5] * len(said))
        t.add(tok.encode(f"\n\n<information>{documents}</information>\n\n"))
        t.searches.append((Query("mayor Kalan", question), Documents(documents, noisy)))
    ids = tok.encode(f"<answer> {answer}</answer>" if answer else "<think> unknown</think>")
    t.add(ids, [-0.25] * len(ids))
    t.answer, t.end = answer, "answer" if answer else "turns"
    return t


Q = Question("mayor Kalan?", ("Bato",), "1", 1)
FLAGS = dict(policy="tiny", sim="tiny", steps=3, questions=2, group=2, seed=0, algorithm="grpo", device="cpu")
FLAGS |= {"shuffle_rewards": False, "grad_clip": 1.0, "out": EVIL}
LOG = {"reward": 0.5, "em": 0.5, "searches": 1.0, "noise": 0.25, "length": 30.0, "kl": 0.01, "entropy": 0.5}
LOG |= {"ends": {"answer": 3, "turns": 1}, "simulator": {"useful": {"n": 3, "answer": 1.0}}, "gap": 1e-7}
LOG |= {"unanswered": 0.25, "flat": 0.0, "grad_norm": 0.1, "tokens_per_second": 1234.0}
LOG |= {"seconds_act": 1.0, "seconds_learn": 2.0}


def write_run(out, tok, question=Q, documents="Doc 1: mayor Kalan Bato", right=4):
    """A run of three steps in two groups of two, and four held-out questions, `right` of them after."""
    out.mkdir()
    (out / "args.json").write_text(json.dumps({"given": {"steps": 3}, "settled": FLAGS}))
    (out / "log.jsonl").write_text("".join(json.dumps({"step": n} | LOG) + "\n" for n in (1, 2, 3)))
    (out / "result.json").write_text('{"seconds": 12.0}')
    rows = Kept(out, 3, tok)
    other = Question("home Bato?", ("Kaburg",), "2", 1)
    for step in range(5):
        if step in (0, 4):
            answers = ["Bato"] * right + ["Kato"] * (4 - right) if step else ["Kato"] * 4
            asked = [Question(f"{question.text} {i}", question.answers, str(i), 1) for i in range(4)]
            ts = [episode(tok, q, documents, a, searches=bool(step)) for q, a in zip(asked, answers)]
            scored = [evaluation.answered(t) for t in ts]
            rows.add(step, ts, scored, held={"sampled": scored})
            continue
        ts = [episode(tok, question, documents), episode(tok, question, documents, "Kato", 2, True)]
        ts += [episode(tok, other, answer=None), episode(tok, other, answer="Kaburg", searches=0)]
        more = {i: {"reward": r, "advantage": 2 * r - 1, "ratios": [1.5] * sum(t.mask)} for i, r, t in
                zip(range(4), (1.0, 0.0, 0.0, 1.0), ts)}  # fmt: skip
        rows.add(step, ts, [evaluation.answered(t) for t in ts], 2, more=more)
    return out


# ---------------------------------------------------------------------------------------------------- keeping


def test_every_way_to_fail_has_a_name(tok):
    """Where a run fails can only be read off if no two causes share a name."""
    lost, yes = "Doc 1: home Kalan Kaburg", Question("is it?", ("yes",))
    ts = [episode(tok, Q), episode(tok, Q, answer="Bato Kalan"), episode(tok, Q, answer="Kato")]
    ts += [episode(tok, Q, lost, "Kato"), episode(tok, Q, answer="Kato", searches=0)]
    ts += [episode(tok, yes, answer="no"), episode(tok, Q, answer=None)]
    ways = "right", "partly right", "wrong: a document held the answer", "wrong: no document held the answer"
    ways += "wrong: never searched", "wrong: a yes or no question", "no answer"
    assert tuple(kept.outcome(evaluation.answered(t)) for t in ts) == ways


def test_pieces_are_the_tokens(tok):
    """Runs of given and sampled tokens must add up to the text, or colours lie about the mask."""
    t = episode(tok, Q, "Łódź 東京")
    told = kept.told(t, evaluation.answered(t), tok)
    assert "".join(told["pieces"]) == tok.decode(t.ids) and sum(told["runs"]) == len(t.ids)
    mask = [part % 2 for part, n in enumerate(told["runs"]) for _ in range(n)]
    assert mask == t.mask and len(told["logps"]) == sum(t.mask)
    sampled = Trajectory(Q, ids=t.ids[:2], mask=[1, 1], logps=[-1.0, -2.0])
    assert kept.told(sampled, evaluation.answered(t), tok)["runs"] == [0, 2]  # the first is always given


@pytest.mark.parametrize("long", [1, 40])
def test_what_is_kept_is_bounded_and_spread_over_the_run(tok, tmp_path, long):
    """A run of thousands of long episodes would write gigabytes; one that keeps only its start tells nothing
    of the end."""
    rows = Kept(tmp_path, 64, tok)
    ts = [episode(tok, Q, "Doc 1: mayor Kalan Bato\n" * long) for _ in range(128)]
    scored = [evaluation.answered(t) for t in ts]
    for step in range(66):
        rows.add(step, ts, scored, 1 if step in (0, 65) else 8)
    n = len(ts[0].ids)
    assert sum(row["tokens"] for row in rows.rows.rows.values()) < TOKENS + 5 * 8 * n
    steps = [step for step, row in rows.rows.rows.items() if row["groups"]]
    assert {0, 1, 64, 65} <= set(steps) and len([s for s in steps if 32 < s < 64]) > (10 if long == 1 else 3)
    assert all(len(g["episodes"]) == 8 for s in steps if 0 < s < 65 for g in rows.rows.rows[s]["groups"])
    again = Kept(tmp_path, 64, tok)  # a run that goes on after step 32 keeps what it would have kept
    again.rows.keep(33)
    assert again.few(33, ts, 8) == rows.few(33, ts, 8)


def test_failures_on_held_out_questions_are_kept(tok, tmp_path):
    """Of a run that is mostly right, the first few held-out questions hold no failure: nobody could read
    where it fails."""
    rows, n = Kept(tmp_path, 3, tok), len(episode(tok, Q).ids)
    answers = ["Bato"] * 3000
    answers[2000], answers[2500] = "Kato", "Bato Kalan"
    ts = [episode(tok, Q, answer=answer) for answer in answers]
    scored = [evaluation.answered(t) for t in ts]
    for step in (0, 4):
        rows.add(step, ts, scored, held={"sampled": scored})
    told = [[e["outcome"] for g in rows.rows.rows[step]["groups"] for e in g["episodes"]] for step in (0, 4)]
    assert set(told[0]) == {"right"} and told[1][-2:] == ["wrong: a document held the answer", "partly right"]
    assert abs(len(told[1]) - rows.room(4) / n) < 2 and told[1].count("right") == len(told[1]) - 2
    worse = [episode(tok, Q, answer="Kato" if i >= 1000 else "Bato") for i in range(3000)]
    kept = rows.few(4, worse, 1, range(1000, 3000))
    assert kept[0] == 0 and abs(len([i for i in kept if i < 1000]) - len(kept) / 2) < 2  # half are as asked


def test_the_page_of_a_long_run_is_small(tok, tmp_path):
    """A page that a mail server refuses is of no use: 64 steps of 128 episodes are under 3 MB."""
    out = write_run(tmp_path / "run", tok)
    rng, rows = np.random.default_rng(0), Kept(out, 64, tok)
    ts = [episode(tok, Question(f"mayor {i // 8}?", ("Bato",))) for i in range(128)]
    for t in ts:
        ids = rng.integers(0, tok.vocab_size, 100).tolist()
        t.add(ids, rng.normal(-3, 1, 100).tolist())
    ratios = rng.normal(1, 0.1, sum(ts[0].mask)).round(3).tolist()
    more = {i: {"reward": 1.0, "advantage": 0.5, "ratios": ratios} for i in range(128)}
    for step in range(66):
        rows.add(step, ts, [evaluation.answered(t) for t in ts], 8, more=more)
    args = json.loads((out / "args.json").read_text())
    args["settled"]["steps"] = 64
    (out / "args.json").write_text(json.dumps(args))
    look.main([str(out)])
    size = (out / "look.html").stat().st_size
    assert 1e6 < size < 3e6


def test_a_page_that_would_be_too_large_says_what_it_leaves_out(tok, tmp_path, monkeypatch):
    """Several runs, or an evaluation of thousands of questions, are more than a page holds."""
    out = write_run(tmp_path / "run", tok)
    monkeypatch.setattr(look, "LIMIT", 2_000)
    look.main([str(out)])
    page = (out / "look.html").read_text()
    told = re.search(r"of (\d+) questions, one in (\d+) of those that were kept", page)
    every = int(told[2])
    assert every > 1 and int(told[1]) == page.count('"episodes":') == -(-6 // every)


# ------------------------------------------------------------------------------------------------ the figures


def test_the_story_of_the_committed_runs():
    """Whoever opens the page of a run and its control must read that one learnt, the other did not, and where
    the first one fails."""
    learnt, control = (look.story(look.read_run(ROOT / "docs" / name)) for name in ("seed0", "shuffled"))
    assert learnt[0].startswith(
        "It learnt: held-out F1 0.191 before, 0.909 after, +0.718 (95 % interval +0.675"
    )
    assert "searches 0.36 to 1.62 (sampled, n = 400)" in learnt[0]
    assert control[0].startswith(
        "It learnt nothing that shows: held-out F1 0.191 before, 0.179 after, -0.013 (95 % "
    )
    assert "interval -0.031 to +0.006" in control[0] and "control" in control[1]
    assert any(
        "Where it fails" in line and "(held-out, after)" in line and "wrong" in line for line in learnt
    )


def test_the_picture_is_made_from_the_committed_runs(tmp_path, monkeypatch):
    """A picture that nobody can make again is an advertisement."""
    monkeypatch.chdir(ROOT)
    look.main(["docs/seed0", "docs/shuffled", "--picture", str(tmp_path / "picture.svg")])
    assert (ROOT / "docs" / "picture.svg").read_text() == (tmp_path / "picture.svg").read_text()


def test_ticks_are_round_and_hold_the_values():
    """A curve that leaves its chart, or an axis of 0.2387, 0.4774, cannot be read."""
    for low, high in ((0, 1), (0, 0), (0, 3e-7), (-0.2, 0.9), (0, 12_345), (0.3, 0.31)):
        ticks = look.ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 6
        assert all(len(f"{t:.3g}") <= 8 for t in ticks)
    svg = look.chart([("a", [(1, 0.0), (2, 1.0), (3, 0.5)], 0, False)])
    drawn = re.search(r'class="line c0".* d="M([^"]*)h0"', svg)[1]
    ys = [float(point.split()[1]) for point in drawn.split("L")]
    assert ys[0] == max(ys) and ys[1] == min(ys) and ys[2] == pytest.approx((ys[0] + ys[1]) / 2, abs=0.1)


def test_held_out_scores_between_are_drawn(tok, tmp_path):
    """With --eval-every the held-out F1 is a curve: its two ends tell nothing of the way."""
    out = write_run(tmp_path / "run", tok)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log[1]["held_f1"] = 0.75
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    drawn = look.lines([look.read_run(out)], ("held", "held_f1"))
    assert drawn == [(str(out), [(0, 0.0), (3, 1.0)], 0, False), (str(out), [(2, 0.75)], 0, True)]


def test_a_run_that_goes_on_can_be_looked_at(tok, tmp_path, capsys):
    """The last line of a file that is being written is half there; a run without a step has no curve."""
    out = write_run(tmp_path / "run", tok)
    for name in ("log.jsonl", "episodes.jsonl"):
        text = (out / name).read_text().splitlines(keepends=True)
        (out / name).write_text("".join(text[:2]) + text[2][:20])
    (out / "result.json").unlink()
    look.main([str(out)])
    page = (out / "look.html").read_text()
    assert "2 of 3 steps" in page and "episodes (step 1) are right" in page
    (out / "log.jsonl").unlink()
    (out / "episodes.jsonl").unlink()
    look.main([str(out)])
    assert "0 of 3 steps" in (out / "look.html").read_text()


def test_what_is_no_run_is_an_error(tmp_path):
    """One line, and no half a page."""
    with pytest.raises(ValueError, match="not the directory of a run"):
        look.main([str(tmp_path)])
    (tmp_path / "x.json").write_text('{"f1": 1}')
    with pytest.raises(ValueError, match="has no flags"):
        look.main([str(tmp_path / "x.json")])
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "main, flags",
    [
        (train.main, "--steps 1 --questions 1 --group 2 --sft-steps 0 --eval-questions 2 --out run"),
        (evaluation.main, "--policy tiny --search toy --limit 2 --json a.json"),
        (evaluation.main, "--data q.jsonl --search bm25:c.jsonl --json a.json"),
    ],
)
def test_a_command_ends_by_naming_the_page(main, flags, body, tmp_path, capsys, monkeypatch):
    """Nobody looks for a page that nothing names; and what is named must open."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(weights.PRESETS, "tiny", str(body))
    monkeypatch.setattr(texts.audit, "__defaults__", (8, 0))
    Path("q.jsonl").write_text('{"question": "capital of Peru", "answer": "Lima"}')
    Path("c.jsonl").write_text('{"title": "Peru", "contents": "its capital is Lima"}')
    main([*flags.split(), "--device", "cpu"])
    named = re.search(r"see it with: python look.py (.*)$", capsys.readouterr().out.strip())[1]
    look.main([named])
    assert "<h1>" + named in Path(capsys.readouterr().out.split(":")[0]).read_text()


# ----------------------------------------------------------------------------------------------- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")


def browse(page, tmp_path, script, width=1200):
    """What `script`, run in the page, returns; raises on any error on the console."""
    text = page.read_text(encoding="utf-8")
    errors = (
        "<script>window.errors = []; addEventListener('error', e => errors.push(e.message), true)</script>"
    )
    text = text.replace("<meta", f"{errors}<meta", 1)
    ask = "<script>{ const told = (() => {" + script + "})(), pre = document.createElement('pre');"
    ask += "pre.textContent = JSON.stringify([errors, document.title, told]); pre.id = 'told';"
    ask += "document.body.append(pre); }</script>"
    copy = tmp_path / "copy.html"
    copy.write_text(text + ask, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", copy.as_uri()],
        capture_output=True, text=True, timeout=120, errors="replace",
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    said = re.search('<pre id="told">(.*)</pre>', done.stdout, re.DOTALL)[1]
    errors, title, told = json.loads(html.unescape(said))
    assert not errors and title != "hacked"
    return told


@browser
def test_the_page_in_a_browser(tok, tmp_path):
    """Filters, keys, siblings side by side, colours: the page is a program, and only a browser can run it."""
    out = write_run(tmp_path / "run", tok, right=3)
    look.main([str(out)])
    page = out / "look.html"
    assert not re.search(
        r"""(src|href)=["']?(https?:)?//|@import|url\(""", page.read_text()
    )  # needs no network
    told = browse(
        page,
        tmp_path,
        """const out = {};
        const found = () => +$("count").textContent.split(" ")[0];
        const set = (id, v) => { $(id).value = v; $("filters").oninput(); return found(); };
        const key = k => document.body.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
        const text = q => [...document.querySelectorAll(q)].map(e => e.textContent);
        const all = q => [...document.querySelectorAll(q)];
        out.charts = all("figure svg").length;
        out.all = [all("#list button").length, $("count").textContent];
        out.step = set("step", "step 1"); out.cards = text("article small").map(t => t.includes("advantage"));
        const hit = "article:not(.pale) ";
        out.sampled = text(hit + ".own").slice(0, 9).join(""); out.marked = text(hit + "mark");
        out.coins = all(hit + ".docs").map(e => e.title); out.docs = text(hit + ".docs");
        set("colour", "advantage");
        out.paint = all(hit).map(e => e.querySelector(".own").style.background);
        out.tip = document.querySelector(hit + ".own").title;
        set("colour", "sampled / given"); out.plain = document.querySelector(".own").style.background;
        const now = () => [text("#head h3")[0], text("article[aria-current=true] > b")[0]];
        out.keys = ["", "j", "j", "k", "k"].map(k => { key(k); return now(); });
        document.querySelectorAll("#list button")[1].click(); out.pressed = now();
        set("step", ""); all("#list button")[4].click(); 
        out.same = text("article h3").map(t => t.split(", ")[1]);
        out.unanswered = set("outcome", "… no answer"); set("outcome", "");
        out.twice = set("searches", "searches: 2"); out.pale = all(".pale").length;
        out.first = text("article")[0];
        set("searches", ""); out.right = set("reward", "reward: 1.0"); set("reward", "");
        out.both = set("searches", "searches: 2") + " " + set("reward", "reward: 1.0"); set("searches", "");
        set("reward", ""); out.turns = set("end", "end: turns"); set("end", "");
        out.found = set("text", "KABURG"); out.none = set("text", "nowhere") + $("head").textContent;
        set("text", "");
        out.before = set("step", "held-out, before"); out.after = set("step", "held-out, after");
        out.ends = text("article h3").map(t => t.split(", ").pop());
        out.engine = document.querySelector(".docs").title;
        return out;""",
    )
    assert told["charts"] == 12 and told["all"] == [6, "20 of 20 episodes, 6 of 6 questions"]
    assert told["step"] == 4 and told["cards"] == [True] * 6
    assert told["sampled"].startswith("<search> mayor Kalan</search><answer> Bato</answer>")
    assert told["marked"] == ["Bato"] * 3
    assert all("Doc 1" in text for text in told["docs"])  # not the prompt
    assert told["coins"] == ["asked for: useful", "asked for: noisy", "asked for: noisy"]
    assert "--c0" in told["paint"][0] and "--c1" in told["paint"][1] and told["plain"] == ""
    assert told["tip"] == "log-prob -0.5 · advantage 1 · ratio 1.5"
    one, two = (["mayor Kalan?", f"answer: {a}"] for a in ("Bato", "Kato"))
    other = ["home Bato?", "no answer"]
    assert told["keys"] == [one, two, other, two, one] and told["pressed"] == other
    assert told["same"] == ["step 1", "step 1", "step 2", "step 2", "step 3", "step 3"]
    assert told["unanswered"] == told["turns"] == 3 and told["right"] == 3 + 3 + 3
    assert told["twice"] == 3 and "answer: Kato" in told["first"] and told["pale"] == 3
    assert told["both"] == "3 0", "two filters must hold for the same episode, not for its question"
    assert told["found"] == 6 and told["none"].startswith("0No episode is like that.")
    assert (told["before"], told["after"], told["ends"]) == (4, 4, ["after", "before"])
    assert told["engine"] == "engine: useful"


@browser
def test_print_and_a_phone_cut_nothing(tmp_path):
    """On paper nothing can be scrolled: the score table must fit an A4 page, a phone's page its screen."""
    page, paper = tmp_path / "look.html", tmp_path / "paper.html"
    look.main([str(ROOT / "docs" / "seed0"), str(ROOT / "docs" / "shuffled"), "--out", str(page)])
    paper.write_text(page.read_text().replace("@media print", "@media screen"))
    cut = """const boxes = [...document.querySelectorAll("section, article, figure")];
        return boxes.map(e => e.scrollWidth - e.clientWidth).concat(
        document.documentElement.scrollWidth - innerWidth).filter(x => x > 0);"""
    assert browse(paper, tmp_path, cut, width=718) == []
    assert browse(page, tmp_path, cut.replace("section, ", ""), width=500) == []


@browser
def test_hostile_documents_do_no_harm(tok, tmp_path):
    """A document is whatever a search engine or a model returned: it must not run, not leave its place, not
    turn the text around it, and not make the page wider than the screen."""
    question = Question(EVIL[:120], (EVIL[:40],), "1", 1)
    out = write_run(tmp_path / "run", tok, question, EVIL)
    look.main([str(out)])
    told = browse(
        out / "look.html",
        tmp_path,
        """$("step").value = "step 1"; draw(); const docs = document.querySelector(".docs");
        return { text: docs.textContent, scripts: document.scripts.length, images: document.images.length,
                 inside: docs.querySelectorAll("script, img, pre").length,
                 wide: document.documentElement.scrollWidth - innerWidth,
                 cut: [...document.querySelectorAll("pre")].some(e => e.scrollWidth > e.clientWidth) };""",
        width=500,
    )
    assert "<script>document.title = 'hacked'</script>" in told["text"] and "x" * 10_000 in told["text"]
    assert "\u202e" not in told["text"]
    assert told["scripts"] == 4 and told["images"] == 0 and told["inside"] == 0
    assert told["wide"] <= 0 and not told["cut"]


@browser
def test_evaluations_and_their_comparison(tmp_path):
    """Two evaluations of the same questions belong side by side, with the test of their difference."""
    for name, right in (("a", 3), ("b", 9)):
        rows = []
        for i in range(12):
            scores = dict.fromkeys(("f1", "em", "cover_em"), float(i < right))
            row = {"set": "nq", "number": i, "id": str(i), "question": f"q{i} <b>?", "golden_answers": ["x"]}
            row |= {"hops": 0, "answer": "x" if i < right else "y", "end": "answer", "queries": [f"find {i}"]}
            rows.append(row | scores | {"searches": 1, "found": 1.0, "seconds": 0.1})
        figures = evaluation.report.figures(rows, draws=100)
        (tmp_path / f"{name}.json").write_text(
            json.dumps(figures | {"flags": {"policy": name}, "questions": rows})
        )
    look.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    page = tmp_path / "a.html"
    assert ">nq f1<td>12<td>0.250<td>0.750<td>0.500<td>" in page.read_text()
    told = browse(
        page,
        tmp_path,
        """const all = $("list").querySelectorAll("button").length; $("text").value = "find 3"; draw();
        const cards = [...document.querySelectorAll("article")];
        return [all, $("list").querySelectorAll("button").length, cards[0].querySelector("pre").textContent,
                ...cards.map(e => e.querySelector("small").textContent)];""",
    )
    wrong, right = "wrong: a document held the answer · F1 0 · end: answer", "right · F1 1 · end: answer"
    assert told == [12, 1, "search: find 3\n", wrong, right]
