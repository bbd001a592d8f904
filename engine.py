"""The engine: it decodes all episodes of a step together, token by token, in a fixed number of seats.

A seat is a row of the key-value cache. All busy seats decode in one batch, one token a step: the policy's
rows and those that write documents for them. A turn that ends makes room for the next; an episode keeps its
seat between turns, so that nothing is fed twice. What an episode is: rollout.py.

On a GPU the cache is in pages, and a seat takes one when it needs one: few episodes become as long as they
may. If none is left, a seat is *preempted*: its pages go to others, and what it held is fed again later (a
turn under way is sampled again, with the same random numbers). Every run ends all the same:
- of the turns that decode, the oldest episode's is preempted last; alone it has all pages, and a full seat
  needs no more than there are; so it ends, after at most as many steps as it may sample tokens;
- if no turn decodes, the first that waits is seated, with the pages of seats that only wait;
- so turns go on ending, and an episode has finitely many.

Not an inference server: no batching across bodies, no cache of what has gone.

    engine = Engine({POLICY: (model, tok), SIMULATOR: (model, tok)}, seats=64, capacity=4096)
    trajectories = engine.run([episode(q, search, tok) for q in questions])
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from operator import itemgetter
from queue import SimpleQueue

import numpy as np
import torch

import kernels
from cache import PAGE, Cache, Pages
from cli.screen import say
from model import REFERENCE, Model, Stack
from rollout import Episode, Sampled, Turn, stopped, uniforms


@dataclass(eq=False)
class Job:
    """A generator on its way, and what it is to be sent next."""

    index: int
    generator: Episode
    value: object = None
    contexts: list = field(default_factory=list)  # whose seats go when it ends


@dataclass(eq=False)
class Seat:
    """A row of the cache and who sits there."""

    row: int
    context: object
    role: int
    ids: list[int] = field(default_factory=list)  # of its earlier turns, and what its turn begins with
    fed: int = 0  # tokens in the cache
    room: int = 0  # tokens that its pages hold
    begun: int = 0  # tokens in the cache when its turn began to sample
    limit: int = 0  # tokens that its turn may sample
    job: Job | None = None
    turn: Turn | None = None
    lends: list[tuple] = field(default_factory=list)  # keys in `Pool.prompts` under which it was entered

    @property
    def new(self) -> int:
        """Tokens to feed: the last one joins the decode batch."""
        return len(self.ids) - self.fed - 1


@dataclass
class Stats:
    """What a run cost."""

    prefilled: int = 0  # tokens fed in bulk
    shared: int = 0  # tokens of prompts that another seat lent
    preempted: int = 0  # times that a seat lost its pages, to be fed again
    decoded: int = 0  # tokens sampled
    steps: int = 0  # decode steps
    seconds: float = 0.0


Tell = Callable[[int, int, Stats], None]
Warp = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PATIENCE = 8  # on a GPU a prefill costs the host as much for one turn as for many: see `take`
EARLY = 128  # episodes begun before they have a seat, at least: they keep a server busy
NUMBERS = ("last id", "length", "count", "on", "limit", "kind of stops", "role")  # that a row has


def bucket(n: int) -> int:
    """n rounded up, by less than a quarter: 1 2 3 4 5 6 7 8 10 12 14 16 20 ..."""
    size = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-n // size) * size


class Pool:
    """One body's seats. Rows 0..busy-1 are decoding, the others are parked or free; busy rows are kept
    together, so that attention sees a view of the cache and idle seats cost nothing."""

    def __init__(
        self, model: Model, tok, seats: int, capacity: int, prefill: int, reserve: int,
        pages: int = 0, page: int = 0,
    ):  # fmt: skip
        if capacity > (most := model.cos.size(0)):
            raise ValueError(
                f"seats of {capacity} tokens are longer than the {most} this body can read: "
                "lower --episode-tokens (and --seat-tokens)"
            )
        gpu = kernels.compiled(model.cos)
        page = page or (PAGE if gpu or pages else capacity)
        most = seats * -(-capacity // page)
        pages = min(pages or most, most)
        if pages * page < capacity:
            raise ValueError(
                f"{pages} pages of {page} tokens hold {pages * page:,}, but a single seat may need "
                f"{capacity:,}: lower --seat-tokens, or give the cache more memory"
            )
        model.pack(seats)
        self.model, self.tok, self.tensor = model, tok, partial(torch.tensor, device=model.device)
        self.capacity, self.budget, self.reserve = capacity, prefill, reserve
        self.patience = PATIENCE if gpu else 0
        self.stack: Stack = model.stacked(None)  # before the cache takes the memory: matrices may move
        sizes = model.config, seats, capacity, model.dtype, model.device
        self.cache = Pages(*sizes, pages, page) if page < capacity else Cache(*sizes)
        self.stops: dict[tuple[str, ...], int] = {}
        self.closers = torch.zeros(0, model.config.vocab, dtype=torch.bool, device=model.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by rows
        self.warp: Warp | None = None

        def column(dtype, *more):
            return torch.zeros(seats, *more, dtype=dtype, device=model.device)

        self.numbers = column(torch.long, len(NUMBERS)).T.contiguous()  # (numbers, seats)
        self.last, self.length, self.count, self.on, self.limit, self.kind, self.role = self.numbers
        self.temperature, self.due = column(torch.float32), column(torch.bool)
        self.u = column(torch.float32, capacity)
        self.ids, self.logps = column(torch.long, capacity), column(torch.float32, capacity)
        self.clear()

    def clear(self, warp: "Warp | None" = None) -> None:
        """Empty every seat and read the adapters anew: the start of a run."""
        self.rows: list[Seat | None] = [None] * self.numbers.size(1)
        for row in range(len(self.rows)):
            self.cache.drop(row)
        self.busy = 0
        self.numbers.zero_()
        self.waiting = deque(), deque(), deque()  # (job, turn) by rank: see `take`
        self.seated: dict[int, Seat] = {}  # id of a context -> its seat
        self.prompts: dict[tuple, Seat] = {}  # (role, ids) -> the last seat that holds them at its beginning
        stack = self.model.stacked(self.stack)
        if stack is not self.stack or warp is not self.warp:
            self.graphs.clear()  # they read the old one
        self.stack, self.warp = stack, warp

    def move(self, seat: Seat, row: int) -> None:
        """Put a seat on another row; whoever sits there takes the seat's old row."""
        old, other = seat.row, self.rows[row]
        if old == row:
            return
        self.cache.swap(old, row, seat.fed, other.fed if other else 0)
        if other:
            other.row = old
        self.rows[old], self.rows[row], seat.row = other, seat, row

    def release(self, seat: Seat) -> None:
        """Free a seat that is not decoding."""
        self.empty(seat)
        self.rows[seat.row] = None
        self.seated.pop(id(seat.context), None)

    def empty(self, seat: Seat) -> None:
        """Take away what a seat holds: it has no pages then, and lends nothing."""
        for key in seat.lends:
            if self.prompts.get(key) is seat:
                del self.prompts[key]
        seat.lends.clear()
        self.cache.drop(seat.row)
        seat.fed = seat.room = 0

    def preempt(self, stats: Stats) -> None:
        """Empty a seat: one that does not decode before those that do, and the youngest episode's first."""
        held = (seat for seat in self.rows if seat and seat.room)
        seat = max(held, key=lambda seat: (seat.row >= self.busy, seat.job.index))
        stats.preempted += 1
        if seat.row < self.busy:  # its turn will be sampled again
            self.leave(seat)
            del seat.ids[len(seat.ids) - len(seat.turn.ids) :]
            self.waiting[seat.context is None].appendleft((seat.job, seat.turn))
        if seat.context is None:
            self.release(seat)
        else:
            self.empty(seat)

    def wait(self, job: Job, turn: Turn) -> None:
        """Queue a turn."""
        rank = 0 if id(turn.context) in self.seated else 1 if turn.context is None else 2
        self.waiting[rank].append((job, turn))

    def take(self, stats: Stats) -> list[Seat]:
        """Seat as many waiting turns as possible: first those that have a seat, then those that write
        documents, then new episodes, but for some seats (else all could wait for documents for ever).
        With `patience` none is, until there is one for that many busy rows: then they share a prefill."""
        free = [r for r in range(self.busy, len(self.rows)) if self.rows[r] is None]
        seated, documents, new = map(len, self.waiting)
        documents = min(documents, len(free))
        new = min(new, max(0, len(free) - documents - self.reserve))
        least = self.busy // self.patience if self.patience else 0
        if seated + documents + new < max(1, least):
            return []
        while not (ranks := self.affordable((seated, documents, new))) and not self.busy:
            self.preempt(stats)
        taken = []
        for rank in ranks if len(ranks) >= least else ():
            job, turn = self.waiting[rank].popleft()
            seat = self.seated.get(id(turn.context)) or Seat(free.pop(), turn.context, turn.role)
            if rank == 2:
                self.seated[id(turn.context)] = seat
                job.contexts.append(seat)
            self.rows[seat.row], seat.job, seat.turn = seat, job, turn
            taken.append(seat)
        return taken

    def affordable(self, counts: tuple[int, ...]) -> list[int]:
        """Of the first `counts` turns of each rank, in their order, the ranks of those for which there are
        pages, up to the first for which there are not. A new episode leaves a page for each busy row."""
        pages, ranks = len(self.cache.free), []
        for rank, count in enumerate(counts):
            for _, turn in islice(self.waiting[rank], count):
                seat = self.seated.get(id(turn.context))
                n = len(turn.ids) + (len(seat.ids) if seat else 0)
                if n >= self.capacity:
                    raise ValueError(f"{n} tokens do not fit in a seat of {self.capacity}")
                pages -= self.cache.lacks(seat.row if seat else None, n)
                if pages < (self.busy if rank == 2 else 0):
                    return ranks
                ranks.append(rank)
        return ranks

    def feed(self, seats: list[Seat], stats: Stats) -> None:
        """Bring the taken seats to where their last token is due. What another seat holds of a prompt, all of
        it or whole pages of its beginning, is shared; who shares with a seat of this call waits a round."""
        for seat in seats:
            seat.ids += seat.turn.ids
        wave, copies = seats, []
        while wave:
            now, later, coming = [], [], set()
            for seat in wave:
                keys = self.prefixes(seat)
                held = next((key for key in keys if key in self.prompts), (seat.role, ()))
                ahead = next((key for key in keys if key in coming), (seat.role, ()))
                if keys and keys[0] in (held, ahead):
                    copies.append((seat, keys[0]))
                elif len(ahead[1]) > len(held[1]):
                    later.append(seat)
                else:
                    coming.update(keys)
                    now.append((seat.new - len(held[1]), seat, held, keys))
            self.prefill(sorted(now, key=itemgetter(0)), stats)
            wave = later
        for seat, key in copies:
            self.join(seat, key, stats)
        self.begin(seats)

    def prefixes(self, seat: Seat) -> list[tuple]:
        """What an empty seat may share, longest first: (role, all ids that are fed), then whole pages of
        them."""
        n = seat.new
        sizes = [n, *range((n - 1) // PAGE * PAGE, 0, -PAGE)] if seat.fed == 0 < n else []
        return [(seat.role, tuple(seat.ids[:size])) for size in sizes]

    def prefill(self, seats: list[tuple], stats: Stats) -> None:
        """Feed the seats of a round, in batches under the token budget; then they can lend."""
        first = self.busy
        for _, seat, held, _ in seats:
            self.join(seat, held, stats)
        while first < self.busy:
            end = first + 1
            while end < self.busy and (end + 1 - first) * self.rows[end].new <= self.budget:
                end += 1
            self.extend(slice(first, end), stats)
            first = end
        for _, seat, _, keys in seats:
            seat.lends += keys
            self.prompts.update(dict.fromkeys(keys, seat))

    def join(self, seat: Seat, key: tuple, stats: Stats) -> None:
        """Make a seat the last of the busy ones, with the beginning of its prompt from a seat that holds it,
        and pages for the rest."""
        self.move(seat, self.busy)
        self.busy += 1
        if key[1]:
            seat.fed = len(key[1])
            self.cache.share(self.prompts[key].row, seat.row, seat.fed)
            stats.shared += seat.fed
        seat.room = self.cache.grow(seat.row, len(seat.ids))

    def extend(self, rows: slice, stats: Stats) -> None:
        """Feed all but the last pending token of neighbouring rows, in one padded batch."""
        seats = self.rows[rows]
        feeds = [s.ids[s.fed : -1] for s in seats]
        longest = max(map(len, feeds))
        if longest == 0:
            return
        block = self.tensor([f + [0] * (longest - len(f)) for f in feeds])  # (B, T)
        start, lens = self.tensor([s.fed for s in seats]), self.tensor([len(f) for f in feeds])
        window = self.cache.window(rows, max(s.fed for s in seats) + longest, start, lens)
        role = self.one_or_each(seats, self.tensor([s.role for s in seats]))
        self.model(block, role, window=replace(window, feeds=True), lora=self.stack.rows(role))
        for s, f in zip(seats, feeds):
            s.fed += len(f)
            stats.prefilled += len(f)

    @staticmethod
    def one_or_each(seats: list[Seat], column: torch.Tensor) -> int | torch.Tensor:
        """The seats' role where all have the same (cheaper), else the column (B,) of their roles."""
        return seats[0].role if len({s.role for s in seats}) == 1 else column

    def begin(self, seats: list[Seat]) -> None:
        """Write turns into their rows' columns."""
        columns = []
        for seat in seats:
            turn, r = seat.turn, seat.row
            seat.begun, seat.limit = seat.fed, (limit := min(turn.limit, self.capacity - seat.fed - 1))
            columns.append((seat.ids[-1], seat.fed, 0, 1, limit, self.kind_of(turn.stops), seat.role))
            if turn.temperature > 0:
                self.u[r, :limit] = torch.from_numpy(uniforms(turn.address, limit).astype(np.float32))
        rows = [seat.row for seat in seats]
        self.numbers[:, rows] = self.tensor(columns).T
        self.temperature[rows] = self.tensor([seat.turn.temperature for seat in seats])

    def kind_of(self, stops: tuple[str, ...]) -> int:
        """The index of a set of stops. A token may close one only if it holds the last character of one."""
        if stops not in self.stops:
            ends = {s[-1].encode()[-1] for s in stops}
            ids = range(self.model.config.vocab)  # may be more than the tokenizer knows
            flags = [i in self.tok.eos or not ends.isdisjoint(self.tok.token_bytes(i)) for i in ids]
            self.closers = torch.cat((self.closers, self.tensor([flags])))
            self.graphs.clear()  # they know the old one
            self.stops[stops] = len(self.stops)
        return self.stops[stops]

    def step(self, stats: Stats) -> list[tuple[Job, Sampled]]:
        """One token for every busy row. Returns the turns that ended."""
        self.give_pages(stats)
        seats, upto = self.rows[: self.busy], 1 + max(seat.fed for seat in self.rows[: self.busy])
        if kernels.compiled(self.last):
            self.replay(self.busy)
        else:
            self.decode(self.busy, upto, self.one_or_each(seats, self.role[: self.busy]))
        stats.steps += 1
        stats.decoded += len(seats)
        for seat in seats:
            seat.fed += 1
        due = self.due[: self.busy].nonzero()[:, 0].tolist()  # all that is fetched, unless a turn may be over
        said = [(seats[i], self.ids[i, : seats[i].fed - seats[i].begun].tolist()) for i in due]
        ended = [(seat, ids, self.ended(seat, ids)) for seat, ids in said]
        return [(seat.job, self.finish(seat, ids, end)) for seat, ids, end in ended if end]

    def give_pages(self, stats: Stats) -> None:
        """A further page for each busy row that has filled its last one."""
        while len(full := [s for s in self.rows[: self.busy] if s.fed == s.room]) > len(self.cache.free):
            self.preempt(stats)
        for seat in full:
            seat.room = self.cache.grow(seat.row, seat.fed + 1)

    def decode(self, n: int, upto: int, role: int | torch.Tensor, on: torch.Tensor | None = None) -> None:
        """Sample a token for the first n rows, all on the device; then none holds more than `upto` tokens.
        on (n,): 0 for rows that are to be left as they are."""
        at = self.count[:n, None]
        window = self.cache.window(slice(0, n), upto, self.length[:n], on)
        h = self.model(self.last[:n, None], role, window=window, lora=self.stack.rows(role))  # (n, 1, d)
        u = self.u[:n].gather(1, at)[:, 0]
        logits = self.model.logits(h[:, 0])
        if self.warp is not None:
            logits = self.warp(logits, self.role[:n])
        ids, logps = kernels.sample(logits, u, self.temperature[:n])
        self.ids[:n].scatter_(1, at, ids[:, None])
        self.logps[:n].scatter_(1, at, logps[:, None])
        self.last[:n] = ids
        self.numbers[1:3, :n] += 1 if on is None else on  # length and count
        full = self.count[:n] >= self.limit[:n]
        torch.logical_or(self.closers[self.kind[:n], ids], full, out=self.due[:n])

    def replay(self, n: int) -> None:
        """`decode` from a CUDA graph, recorded once for each bucket of rows; those beyond n are not on."""
        self.cache.update()
        n = min(bucket(n), len(self.rows))
        if n not in self.graphs:
            role = self.role[:n] if self.model.roles else REFERENCE
            numbers, graph = self.numbers.clone(), torch.cuda.CUDAGraph()
            self.on.zero_()
            self.decode(n, self.capacity, role, self.on[:n])  # Triton compiles, and no row is changed
            self.numbers.copy_(numbers)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self.decode(n, self.capacity, role, self.on[:n])
            self.graphs[n] = graph
        self.graphs[n].replay()

    def ended(self, seat: Seat, ids: list[int]) -> str | None:
        """Why a turn that has sampled these ids is over, if it is."""
        if ids[-1] in self.tok.eos:
            return "eos"
        if stopped([*seat.turn.before, *ids], seat.turn.stops, self.tok):
            return "stop"
        return "limit" if len(ids) >= seat.limit else None

    def finish(self, seat: Seat, ids: list[int], end: str) -> Sampled:
        """End a turn. Raises ValueError if its log-probs are not finite."""
        logps = self.logps[seat.row, : len(ids)].tolist()
        if not math.isfinite(sum(logps)):
            raise ValueError("sampling met logits that are not finite: use --dtype bf16 or fp32")
        seat.ids += ids
        self.leave(seat)
        if seat.context is None:
            self.release(seat)
        return Sampled(ids, logps, end)

    def leave(self, seat: Seat) -> None:
        """Take a row out of the batch: its place goes to the last busy row."""
        r, self.busy = seat.row, self.busy - 1
        if r != self.busy:
            self.move(seat, self.busy)
            self.numbers[:, r] = self.numbers[:, self.busy]
            for column in (self.temperature, self.u, self.ids, self.logps):
                column[r] = column[self.busy]
        self.numbers[:, self.busy] = 0  # off, and of length 0: in a bucket's rows beyond, nothing is read


class Engine:
    """Runs generators to their ends, all turns of all roles together.

    bodies: role -> (model, tokenizer); roles of one body share its seats and its batches. seats: rows of each
    body's cache. capacity: tokens of a seat. prefill: tokens fed in one batch at most. pages: of each body's
    cache, of `page` tokens (64). 0: so many that every seat can be full; on a CPU, whole seats.
    """

    def __init__(
        self, bodies: dict[int, tuple[Model, object]], seats: int, capacity: int, prefill: int = 8192,
        pages: int = 0, page: int = 0,
    ):  # fmt: skip
        self.stats = Stats()
        pools: dict[int, Pool] = {}
        for model, tok in bodies.values():
            shared = sum(other is model for other, _ in bodies.values()) > 1
            if shared and seats < 2:
                raise ValueError("two roles need at least 2 seats: one waits in its seat for the other")
            if id(model) not in pools:
                reserve = max(1, 2 * seats // 5) if shared else 0
                pools[id(model)] = Pool(model, tok, seats, capacity, prefill, reserve, pages, page)
        self.pools = {role: pools[id(model)] for role, (model, _) in bodies.items()}
        self.early = max(seats, EARLY)

    @torch.inference_mode()
    def run(self, generators: Iterable[Episode], tell: Tell | None = None, warp: Warp | None = None) -> list:
        """Run every generator; returns their values in order. tell(done, of, stats) is called as they end.
        warp: (logits (B, V), roles (B,)) -> logits that are sampled from instead.

        What a generator raises comes through: ValueError (a prompt too long), OSError (an engine that fails).
        """
        began, self.stats = time.perf_counter(), Stats()
        pools = dict.fromkeys(self.pools.values())
        for pool in pools:
            pool.clear(warp)
        jobs = deque(Job(i, g) for i, g in enumerate(generators))  # not begun yet
        results: list = [None] * len(jobs)
        ready, early, done = deque(), set(), 0  # early: begun, but never seated
        futures, answered = {}, SimpleQueue()
        try:
            while done < len(results):
                while ready or (jobs and len(early) < self.early):
                    if not ready:
                        ready.append(jobs.popleft())
                        early.add(ready[0])
                    job = ready.popleft()
                    try:
                        wish = job.generator.send(job.value)
                    except StopIteration as end:
                        results[job.index], done = end.value, done + 1
                        early.discard(job)
                        for seat in job.contexts:
                            self.pools[seat.role].release(seat)
                        self.stats.seconds = time.perf_counter() - began
                        if tell is not None:
                            tell(done, len(results), self.stats)
                        continue
                    if isinstance(wish, Future):
                        futures[wish] = job
                        wish.add_done_callback(answered.put)
                    else:
                        self.pools[wish.role].wait(job, wish)
                for pool in pools:
                    if taken := pool.take(self.stats):
                        early.difference_update(seat.job for seat in taken)
                        pool.feed(taken, self.stats)
                    for job, sampled in pool.step(self.stats) if pool.busy else ():
                        job.value = sampled
                        ready.append(job)
                idle = not ready and not any(pool.busy for pool in pools)
                while futures and (idle or not answered.empty()):
                    future, idle = answered.get(), False
                    job = futures.pop(future)
                    job.value = future.result()
                    ready.append(job)
        finally:
            for future in futures:  # after a failure: what is not under way is not sent
                future.cancel()
        if lost := self.stats.preempted:
            say(f"the cache was full: {lost} times a seat lost its pages and was fed again (only slower)")
        return results
