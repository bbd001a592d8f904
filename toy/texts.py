"""The body's pre-training texts, the rows for the simulator's fine-tuning, and the audit of a simulator.

Agents search and engines answer well and badly: RL and fine-tuning then select among behaviours that the
body already has, as with an instruct model. A text is a list of pieces (text, learned), encoded one by one as
in an episode; only learned ones carry the loss. A two-hop question goes through a *bridge*, the entity that
its first relation leads to.

Not a data set: every text is drawn at random, about a world of its own.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

from prepare.rows import row_of
from rollout import Query, Question, Trajectory
from search import number
from simulator import messages
from words import fill

from .words import END, SIM_WORDS, TURNS, WORDS
from .world import KIND, LINKS, NAMES, RELATIONS, UNKNOWN, VALUES, World, parse, read, say

Piece = tuple[str, bool]
Asked = tuple[str, str]  # entity, relation

# Probabilities of the behaviours in the texts.
GUESS = 0.65  # answers at once, without a search
SLIP = 0.06  # asks for the wrong relation, or about a made-up entity
MISREAD = 0.03  # takes a random object instead of the one in the documents
STOP = 0.55  # answers with the bridge
AGAIN = 0.03  # has the answer, and searches on
RETRY = 0.20  # nothing found: searches again instead of guessing
NOISE = 0.25  # a search finds nothing
OBEY = 0.70  # the simulator writes documents of the quality that was ordered

# Kinds of searches -> their share in the body's texts, and in the fine-tuning (more of the hard ones).
SEARCHES = {
    "first": (0.34, 0.25),  # the question's entity and first relation
    "second": (0.26, 0.27),  # the bridge, which an earlier search led to, and the last relation
    "shortcut": (0.08, 0.08),  # the question's entity and the last relation, which it cannot have
    "invented": (0.20, 0.28),  # a random other entity, and the last relation
    "stranger": (0.08, 0.10),  # an entity from unrelated documents, and the last relation
    "slip": (0.04, 0.02),  # any other mistake
}


def begin(rng: random.Random, hops: int | None = None) -> tuple[World, Question, str, list[str]]:
    """A new world and a question about it, with the question's entity and relations."""
    world = World(rng.getrandbits(48))
    question = world.ask(rng, hops)
    entity, *relations = parse(question.text)
    return world, question, entity, relations


def slip(asked: Asked, relations: list[str], rng: random.Random) -> Asked:
    """A wrong query instead of `asked`: the last relation of the first entity, or a made-up entity."""
    if len(relations) == 2 and rng.random() < 0.5:
        return asked[0], relations[-1]
    return rng.choice(VALUES[RELATIONS[asked[1]][0]]), asked[1]


def transcript(rng: random.Random) -> list[Piece]:
    """An episode as rollout.episode formats it, with one of many behaviours: right, lazy, careless, lost."""
    world, question, entity, relations = begin(rng)
    pieces, hop = [(fill(WORDS.prompt, question=question.text), False)], 0
    thought = answer = ""
    for _ in range(0 if rng.random() < GUESS else TURNS):
        asked = entity, relations[hop]
        if rng.random() < SLIP:
            asked = slip(asked, relations, rng)
        documents = world.documents(say(*asked), rng, rng.random() < NOISE)
        pieces.append((f"{thought}<search> {say(*asked)}</search>", True))
        pieces.append((f"\n\n<information>{documents}</information>\n\n", False))
        found = read(documents, asked)
        if rng.random() < MISREAD:
            found = rng.choice(VALUES[RELATIONS[asked[1]][1]])
        thought, last = f"<think> {say(*asked)} {found}</think>", asked[1] == relations[-1]
        if found == UNKNOWN:
            if rng.random() >= RETRY:
                break
        elif rng.random() >= AGAIN if last else rng.random() < STOP:
            answer = found
            break
        elif not last:
            entity, hop = found, 1
    answer = answer or rng.choice(VALUES[RELATIONS[relations[-1]][1]])
    return [*pieces, (f"{thought}<answer> {answer}</answer>", True)]


def reading(rng: random.Random) -> list[Piece]:
    """Facts, then eight questions about what they say and do not say: the skill that all others need."""
    world = World(rng.getrandbits(48))
    facts = [world.distractor((), rng) for _ in range(rng.randint(3, 6))]
    asked = []
    for entity, *_, relation in map(parse, facts * 2):
        if rng.random() < 0.25:  # a near miss: seldom another relation of the entity, else another entity
            if rng.random() < 0.2:
                relation = rng.choice(list(LINKS[KIND[entity]]))
            else:
                entity = rng.choice(VALUES[KIND[entity]])
        asked.append((entity, relation))
    rng.shuffle(asked)
    documents = number(facts)
    pieces = [(f"<information>{documents}</information>\n\n", False)]
    for a in asked[:8]:
        pieces += [(f"<think> {say(*a)}", False), (f" {read(documents, a)}</think>", True)]
    return pieces


def recall(rng: random.Random) -> list[Piece]:
    """Pairs of names, then the same pairs in another order: teaches induction (what followed last time)."""
    pairs = [(f" {rng.choice(NAMES)}", f" {rng.choice(NAMES)}") for _ in range(rng.randint(4, 12))]
    pieces = [("".join(a + b for a, b in pairs), False)]
    for a, b in rng.sample(pairs, len(pairs)):
        pieces += [(a, False), (b, True)]
    return pieces


def situation(rng: random.Random, kind: str) -> tuple[World, Query]:
    """A search of that kind within an episode; some of the searches before it may have found nothing."""
    world, question, entity, relations = begin(rng, 2 if kind in ("second", "shortcut", "stranger") else None)
    last, bridge, earlier = relations[-1], world.follow(entity, relations[:-1]), []
    asked = first = entity, relations[0]

    def search(asked: Asked, noisy: bool) -> None:
        earlier.append((say(*asked), world.documents(say(*asked), rng, noisy)))

    while rng.random() < 0.3 and len(earlier) < 2:
        search(first, noisy=True)
    if kind == "second" or (kind in ("invented", "stranger") and rng.random() < 0.5):
        search(first, noisy=False)
        while rng.random() < 0.2 and len(earlier) < 3:
            search((bridge, last), noisy=True)
    if kind == "slip":
        asked = slip(first, relations, rng)
    elif kind in ("second", "shortcut"):
        asked = bridge if kind == "second" else entity, last
    elif kind != "first":
        others = [e for e in VALUES[RELATIONS[last][0]] if e != bridge]
        seen = [e for _, documents in earlier for e in parse(documents) if e in others]
        asked = rng.choice((kind == "stranger" and seen) or others), last
    return world, Query(say(*asked), question, earlier=tuple(earlier))


def answered(rng: random.Random, tuning: bool = False) -> tuple[Query, str, bool]:
    """A search, the documents that the world has for it, and whether they are noisy (about other entities).

    A random other entity gets a fact of its own, not the golden answer; a relation that an entity cannot have
    gets none. So no shortcut is taught.
    """
    kind = rng.choices(list(SEARCHES), [shares[tuning] for shares in SEARCHES.values()])[0]
    world, query = situation(rng, kind)
    noisy = rng.random() < 0.5
    return query, world.documents(query.text, rng, noisy, ranked=True), noisy


def rows(n: int, seed: int = 0) -> list[dict]:
    """n rows for the simulator's fine-tuning (collect.py), from worlds that are used nowhere else."""
    rng, out = random.Random(f"rows {seed}"), []
    for _ in range(n):
        query, documents, noisy = answered(rng, tuning=True)
        out.append(row_of(query, documents) | {"quality": "noisy" if noisy else "useful"})
    return out


def simulation(rng: random.Random) -> list[Piece]:
    """A search as the simulator is asked, and documents of the quality asked for with probability OBEY."""
    query, documents, noisy = answered(rng)
    order = messages(SIM_WORDS, query, noisy == (rng.random() < OBEY))[1]["content"]
    return [(order, False), (documents + END, True)]


def drill(rng: random.Random, practice: bool = False) -> list[Piece]:
    """Several searches, one fact each, to learn the hard part: when to give the golden answer and when not.

    The searches that the question needs come in order, mixed with as many for other entities' last relation.
    """
    world, question, entity, relations = begin(rng)
    last, bridge, golden = relations[-1], world.follow(entity, relations[:-1]), question.answers[0]
    proper = [(entity, relations[0]), (bridge, last)][: question.hops]
    improper = rng.sample(VALUES[RELATIONS[last][0]], question.hops)
    order = proper + [(other, last) for other in improper if other != bridge]
    rng.shuffle(order)
    if order.index(proper[-1]) < order.index(proper[0]):  # no search has found the bridge yet
        order.append(order.pop(order.index(proper[-1])))
    pieces = [(f"Question: {question.text}", False)]
    for asked in order:
        query = say(*asked)
        if practice and asked != order[-1] and rng.random() < 0.5:
            documents = world.documents(query, rng)
            pieces.append((fill(SIM_WORDS.earlier, query=query, documents=documents), False))
        else:
            told = f"\nQuery: {query}\nAnswer: {golden}\n" + ("Useful:\n" if practice else "")
            pieces += [(f"{told}Doc 1: {query}", False), (f" {world.fact(*asked)}", True)]
    return pieces


def practice(rng: random.Random) -> list[Piece]:
    """The drill with the simulator's prompts; some of the searches appear only as earlier ones in them."""
    return drill(rng, practice=True)


def states(documents: str, asked: tuple[str, ...], answer: str = "") -> bool:
    """Whether documents state a fact about the entity and relation asked for; with `answer`, this one."""
    found = read(documents, asked)
    return found == answer if answer else found != UNKNOWN


def audit(write: Callable[[list[Query], bool], list[str]], n: int = 200, seed: int = 0) -> dict[str, float]:
    """How well a simulator plays the search engine, on n held-out searches of each kind; write: see tasks.py.

    useful_hit   useful documents state the asked fact (for the last relation: with the golden answer)
    noisy_hit    noisy documents state a fact about the asked entity and relation
    leak         useful documents hold the golden answer though the query skips a hop ("shortcut")
    invented     the same for a random other entity's last relation
    """
    rng, address = random.Random(f"audit {seed}"), itertools.count(1)

    def draw(kind: str) -> list[Query]:
        return [replace(situation(rng, kind)[1], address=(seed, 0, next(address), 0, 0)) for _ in range(n)]

    def mean(seen: Callable[[str, Query], bool], queries: list[Query], noisy: bool = False) -> float:
        return sum(map(seen, write(queries, noisy), queries)) / len(queries)

    proper, shortcut, invented = draw("first") + draw("second"), draw("shortcut"), draw("invented")
    return {
        "useful_hit": mean(lambda d, q: states(d, parse(q.text), golden(q)), proper),
        "noisy_hit": mean(lambda d, q: states(d, parse(q.text)), proper, noisy=True),
        "leak": mean(lambda d, q: q.question.answers[0] in d, shortcut),
        "invented": mean(lambda d, q: q.question.answers[0] in d, invented),
    }


def golden(query: Query) -> str:
    """The golden answer if the query asks for the question's last relation, else "": any bridge will do."""
    return query.question.answers[0] if parse(query.text)[1] == parse(query.question.text)[-1] else ""


def skips(query: Query) -> bool:
    """Whether a search skips a hop: it asks the last relation of an entity that no earlier search found."""
    entity, *relations = parse(query.question.text)
    asked = parse(query.text)
    led_to = {read(documents, (entity, relations[0])) for _, documents in query.earlier}
    return len(relations) == 2 and asked[1:] == (relations[-1],) and asked[0] not in led_to


def skipping(trajectories: list[Trajectory]) -> float:
    """The share of the searches for two-hop questions that skip a hop, which leaks would encourage."""
    queries = [query for t in trajectories if t.question.hops == 2 for query, _ in t.searches]
    return sum(map(skips, queries)) / max(1, len(queries))
