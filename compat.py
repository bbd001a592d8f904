"""The defects of the authors' code, as switches, to measure what each costs: `--compat zerosearch`, or names.

    pairing    documents are written for another question: queries were compacted to the rows that search,
               questions were not. Their loop is lock step; here nine of ten earlier rows count as searching.
    kl-sign    the KL in the loss is rewarded, so the policy is paid for leaving its reference
    example    an episode without an answer is graded on the last answer tags of the whole text: the prompt's
    substring  the reward is whether the golden answer stands anywhere in the answer
    retoken    what is trained is the text, encoded again; the end of a turn never is
    top-p      sampling is cut to the likeliest words of mass .95, training is not
    documents  documents are trained on like sampled text, by the policy and PPO's critic

Not theirs, and not part of zerosearch:

    leak       useful documents state the golden answer as the answer to the query, whatever was asked

REINFORCE without a baseline is `--algorithm reinforce`. Not for use: only for comparison.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from model import POLICY
from rollout import Query, Question, Search, Trajectory
from search import number, split_documents

DEFECTS = ("pairing", "kl-sign", "example", "substring", "retoken", "top-p", "documents")
LEAK = "leak"
RETOLD = {"retoken", "top-p", "documents"}  # their log-probs of sampling are not those of training
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def chosen(names: str) -> set[str]:
    """The defects that --compat names. Raises ValueError for an unknown one."""
    named = set(names.split(",")) - {""}
    if unknown := named - {*DEFECTS, LEAK, "zerosearch"}:
        raise ValueError(f"--compat {unknown.pop()} is unknown: zerosearch (all), or {', '.join(DEFECTS)}")
    return named - {"zerosearch"} | set(DEFECTS if "zerosearch" in named else ())


def mispaired(search: Search, asked: list[tuple[int, Question]], group: int) -> Search:
    """pairing: the n-th query of a call is answered for the question of the n-th row."""
    place = {number: i for i, (number, _) in enumerate(asked)}

    def wrong(query: Query):
        *_, number, sibling, call = query.address
        row = place[number] * group + sibling
        other = asked[int(row * 0.9 ** (call + 1)) // group][1]
        return (yield from search(replace(query, question=other)))

    return wrong


def leaking(search: Search) -> Search:
    """leak: the first document of a useful search, in an engine's usual order."""

    def told(query: Query):
        documents = yield from search(query)
        facts = [f"{query.text} {query.question.answers[0]}", *split_documents(documents.text)[1:]]
        return documents if documents.noisy else replace(documents, text=number(facts))

    return told


def example(t: Trajectory, tok) -> str | None:
    """example: what is graded where the policy gave no answer."""
    found = ANSWER.findall(tok.decode(t.ids))
    return found[-1].strip() if found else None


def nucleus(logits: Tensor, role: Tensor, mass: float = 0.95) -> Tensor:
    """top-p: logits (B, V) -> those of the policy's rows without all but the likeliest words of that mass."""
    z = logits.float().sort(-1, descending=True).values
    p = z.softmax(-1)
    least = z.masked_fill(p.cumsum(-1) - p >= mass, float("inf")).amin(-1, keepdim=True)
    return logits.masked_fill((logits < least) & (role == POLICY)[:, None], float("-inf"))


def retold(t: Trajectory, tok, defects: Iterable[str]) -> Trajectory:
    """retoken, documents: the trajectory as it is trained. No log-prob is known: see grpo.py, `assess`."""
    new = replace(t, ids=[], mask=[], logps=[])
    for mine, ids in t.stretches():
        if mine and "retoken" in defects:
            ids = tok.encode(tok.decode([i for i in ids if i not in tok.eos]))
        trained = mine or ("documents" in defects and new.ids)
        new.add(ids, [float("nan")] * len(ids) if trained else None)
    return new
