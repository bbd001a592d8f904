"""One episode as it happens: tokens appear when they are sampled, in two colours.

Not another way to sample: the same episode runs in the same engine, its policy's turns cut into turns of one
token, which share a seat.
"""

import codecs
from collections.abc import Callable
from dataclasses import replace

from cli.screen import harmless
from model import POLICY
from rollout import Episode, Sampled, Trajectory, Turn, stopped
from tokenizer import Tokenizer


class Screen:
    """Writes tokens as they come: sampled ones green, given ones grey, or in [brackets] without colour.

    A character whose bytes are spread over tokens appears with its last one.
    """

    def __init__(self, tok: Tokenizer, write: Callable[[str], object], colour: bool):
        self.tok, self.write = tok, write
        # before and after given text, before and after sampled text
        self.opened = ("\033[90m", "\033[32m") if colour else ("[", "")
        self.closed = ("\033[0m", "\033[0m") if colour else ("]", "")
        self.sampled: bool | None = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, ids: list[int], sampled: bool) -> None:
        """Write tokens of one kind."""
        if ids and sampled != self.sampled:
            self.end()
            self.sampled = sampled
            self.write(self.opened[sampled])
        self._text(b"".join(map(self.tok.token_bytes, ids)))

    def end(self) -> None:
        """Close the stretch of sampled or given text."""
        if self.sampled is not None:
            self._text(b"", final=True)
            self.write(self.closed[self.sampled])
        self.sampled = None

    def _text(self, data: bytes, final: bool = False) -> None:
        self.write(harmless(self.decoder.decode(data, final)))


def shown(t: Trajectory, tok: Tokenizer, colour: bool) -> str:
    """A whole episode as the screen shows it: the picture of the mask."""
    parts: list[str] = []
    screen = Screen(tok, parts.append, colour)
    for sampled, ids in t.stretches():
        screen.show(ids, sampled)
    screen.end()
    return "".join(parts)


def live(run: Episode, tok: Tokenizer, show: Callable[[list[int], bool], None]) -> Episode:
    """The same episode, its policy's turns asked for token by token: show(ids, sampled) tells each."""
    value = None
    while True:
        try:
            wish = run.send(value)
        except StopIteration as end:
            return end.value
        if isinstance(wish, Turn) and wish.role == POLICY:
            show(wish.ids, False)
            value = yield from token_by_token(wish, tok, show)
        else:
            value = yield wish


def token_by_token(turn: Turn, tok: Tokenizer, show: Callable[[list[int], bool], None]) -> Episode:
    """One turn as turns of one token, which share its seat. Returns what the whole turn would have sampled.

    (At temperatures above 0, what it could have sampled: each token draws from an address of its own.)
    """
    ids, logps, given, end = [], [], turn.ids, "limit"
    while end == "limit" and len(ids) < turn.limit:
        one = yield replace(turn, ids=given, limit=1, address=(*turn.address, len(ids)))
        ids, logps, given = ids + one.ids, logps + one.logps, []
        show(one.ids, True)
        stop = stopped([*turn.before, *ids], turn.stops, tok)
        end = "eos" if one.end == "eos" else "stop" if stop else "limit"
    return Sampled(ids, logps, end)
