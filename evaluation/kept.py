"""What a run keeps for its page (look.py): episodes token by token, held-out scores, how episodes went.

`episodes.jsonl` has one row a step: {"step", "outcomes": {outcome: episodes}, "tokens", "groups": [group]}.
Step 0 and the step behind the last are the held-out questions before and after, with their scores as well:
"held": {way: [[a score for each of SCORES]]}. At most about TOKENS tokens are kept of a run (`Kept.room`).

Not a dump of all episodes: on real questions those of one run are gigabytes.
"""

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, zip_longest
from pathlib import Path

from cli.disk import Rows
from rollout import Trajectory
from tokenizer import Tokenizer

TOKENS = 200_000  # of a run: its page stays under 3 MB
SCORES = ("hops", "end", "f1", "em", "cover_em", "searches", "found")  # kept of a held-out question


def outcome(row: dict) -> str:
    """How an episode went. row: its end and scores, as eval.py's `answered` has them."""
    if row["answer"] is None:
        return "no answer"
    if row["f1"] > 0:
        return "right" if row["f1"] == 1 else "partly right"
    if not row["searches"]:
        return "wrong: never searched"
    if row["found"] is None:
        return "wrong: a yes or no question"
    return f"wrong: {'a' if row['found'] else 'no'} document held the answer"


def pieces(tok: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each id; a character whose bytes are spread over ids stands at its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(tok.token_bytes(i)) for i in ids]


def told(t: Trajectory, row: dict, tok: Tokenizer, ratios: Sequence[float] = (), **more) -> dict:
    """One episode: its pieces, lengths of given and sampled stretches in turn (the first is given), log-probs
    and ratios of the sampled tokens, searches with their coins, and how it went. more: reward, advantage."""
    runs = [len(list(run)) for _, run in groupby([0, *t.mask])]
    return {
        "pieces": pieces(tok, t.ids),
        "runs": [runs[0] - 1, *runs[1:]],
        "logps": [round(logp, 2) for logp, m in zip(t.logps, t.mask) if m],
        "ratios": [round(r, 3) for r in ratios],
        "searches": [[query.text, documents.noisy] for query, documents in t.searches],
        **{"answer": t.answer, "end": t.end, "outcome": outcome(row), "f1": row["f1"], **more},
    }


class Kept:
    """The rows of `episodes.jsonl` of a run of `steps` steps, written as the run goes."""

    def __init__(self, out: str | Path, steps: int, tok: Tokenizer):
        self.rows = Rows(Path(out) / "episodes.jsonl", resume=True, key=lambda row: row["step"])
        self.steps, self.tok = steps, tok

    def room(self, step: int) -> float:
        """Tokens that may be kept of a step: 3/20 of all for each of the first, the last, and the held-out
        questions before and after; the steps between share the rest, and may save up for a long group."""
        between = range(2, self.steps)
        if step not in between:
            return TOKENS * 3 / 20
        spent = sum(row["tokens"] for n, row in self.rows.rows.items() if n in between and n < step)
        return TOKENS * 2 / 5 * (step - 1) / len(between) - spent

    def few(self, step: int, ts: Sequence[Trajectory], group: int, failed: Sequence[int] = ()) -> list[int]:
        """The numbers of the episodes to keep while there is room: whole groups, from the first on, in turn
        with those that failed (numbers of the first episode of their groups)."""
        turns = chain.from_iterable(zip_longest(failed, range(0, len(ts), group)))
        room, out = self.room(step), []
        for start in dict.fromkeys(turns):
            if room > 0 and start is not None:
                out += range(start, start + group)
                room -= sum(len(t.ids) for t in ts[start : start + group])
        return sorted(out)

    def add(
        self, step: int, ts: Sequence[Trajectory], rows: list[dict], group: int = 1,
        held: dict[str, list[dict]] | None = None, more: dict[int, dict] | None = None,
    ) -> None:  # fmt: skip
        """Keep a step. rows: `answered` of each episode; held: of all held-out ones, by way; more: number of
        an episode -> its reward, advantage, ratios."""
        worst = sorted((row["f1"], i) for i, row in enumerate(rows) if row["f1"] < 1 and step > self.steps)
        few, groups = self.few(step, ts, group, [i for _, i in worst]), []
        for start in few[::group]:
            q, siblings = ts[start].question, range(start, start + group)
            eps = [told(ts[i], rows[i], self.tok, **(more or {}).get(i, {})) for i in siblings]
            groups.append({"question": q.text, "golds": list(q.answers), "hops": q.hops, "episodes": eps})
        row = {"step": step, "outcomes": Counter(map(outcome, rows)), "groups": groups}
        row |= {"tokens": sum(len(ts[i].ids) for i in few)}
        if held is not None:
            row["held"] = {way: [[r[s] for s in SCORES] for r in part] for way, part in held.items()}
        self.rows.add(row)
