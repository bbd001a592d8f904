"""Servers that stall in the handshake, flood, lie about lengths, and are asked a thousand times at once.

All on this machine; what a server may answer is in ../test_servers.py.
"""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait

import pytest

import servers
from search import ask, open_search, retrieved
from servers import Server, ServerError

GOOD = json.dumps({"result": [[{"contents": "Lima\nLima is the capital of Peru."}]]}).encode()
LIMIT, SLACK = 0.9, 4.0  # seconds; the slack is for a machine on which ten other programs run


class Wire:
    """A TCP server: speak(connection, number of the connection) says what it likes."""

    def __init__(self, speak: Callable[[socket.socket, int], object]):
        self.speak, self.over, self.accepted = speak, threading.Event(), 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._one, args=[connection, self.accepted], daemon=True).start()

    def _one(self, connection: socket.socket, number: int) -> None:
        try:
            self.speak(connection, number)
        except OSError:
            pass
        finally:
            connection.close()

    def trickle(self, data: bytes) -> Callable:
        def speak(connection: socket.socket, number: int) -> None:
            for byte in data:
                connection.sendall(bytes([byte]))
                if self.over.wait(0.02):
                    return

        return speak

    def close(self) -> None:
        self.over.set()
        self.listener.close()


@pytest.fixture
def wire():
    """Starts such servers, and ends them with the test."""
    wires = []

    def start(speak: Callable) -> Wire:
        wires.append(Wire(speak))
        return wires[-1]

    yield start
    for w in wires:
        w.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and no proxies of this machine."""
    monkeypatch.setattr(servers, "PAUSE", 0.02)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def reply(data: bytes, head: str = "", status: str = "200 OK", length: object = None) -> Callable:
    """Read a request, then answer it."""

    def speak(connection: socket.socket, number: int) -> None:
        connection.recv(65536)
        size = len(data) if length is None else length
        first = f"HTTP/1.1 {status}\r\n{head}Content-Length: {size}\r\n\r\n"
        connection.sendall(first.encode() + data)

    return speak


def fails(address: str, limit: float = LIMIT) -> tuple[str, float]:
    """The error's one line, and how long it took."""
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:
        ask(open_search(address, limit=limit), "capital of Peru")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value), time.monotonic() - began


SLOW = {
    "says nothing": lambda w: lambda connection, n: w.over.wait(30),
    "trickles a record": lambda w: w.trickle(b"\x16\x03\x03\x40\x00" + b"\x02" * 16384),
}


@pytest.mark.parametrize("how", SLOW)
def test_a_tls_handshake_that_never_ends_is_bounded(wire, how):
    """A socket's own limit starts anew with every byte, and the alarm was set only after the handshake: one
    such server held a run for ever."""
    w = wire(lambda *a: None)
    w.speak = SLOW[how](w)
    error, seconds = fails(f"https://127.0.0.1:{w.port}")
    assert "no whole answer within" in error and seconds < 1.1 * LIMIT + SLACK


def test_a_proxy_that_trickles_is_bounded(wire, monkeypatch):
    """The tunnel to a server behind a proxy is opened before any request, by a library's own loop."""
    w = wire(lambda *a: None)
    w.speak = w.trickle(b"HTTP/1.1 200 " + b"x" * 9999)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{w.port}")
    monkeypatch.setattr(servers, "_is_here", lambda host: False)
    error, seconds = fails("https://192.0.2.1:9")
    assert "no whole answer within" in error and seconds < 1.1 * LIMIT + SLACK and w.accepted


def test_every_address_of_a_host_shares_the_limit(monkeypatch):
    """A host with many addresses, none of which answers, took the limit once for each."""
    tried = []

    def slow(address, timeout):
        tried.append(timeout)
        time.sleep(min(timeout, 0.05))
        raise TimeoutError

    many = [(0, 0, 0, "", (f"192.0.2.{i}", 9)) for i in range(1, 99)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: many)
    monkeypatch.setattr(socket, "create_connection", slow)
    _, seconds = fails("http://192.0.2.1:9")
    assert seconds < 1.1 * LIMIT + SLACK and len(tried) < 60 and tried[0] > tried[1]


FLOODS = {
    "10,000 headers": reply(GOOD, head="".join(f"X-{i}: y\r\n" for i in range(10_000))),
    "a header of 1 MB": reply(GOOD, head=f"X: {'y' * 2**20}\r\n"),
    "an archive": reply(gzip.compress(b" " * 2**24), head="Content-Encoding: gzip\r\n"),
    "17 MB": reply(b" " * (2**24 + 9)),
    "too long a length": reply(GOOD, length=10**12),
    "a negative length": reply(GOOD, length=-5),
    "a length that is none": reply(GOOD, length="x"),
    "two lengths": reply(GOOD, head="Content-Length: 3\r\n"),
    "broken chunks": reply(b"zz\r\n", head="Transfer-Encoding: chunked\r\n"),
    "a chunk of 1 TB": reply(b"ffffffffff\r\nx", head="Transfer-Encoding: chunked\r\n"),
    "a redirect": reply(b"", head="Location: http://127.0.0.1:9/\r\n", status="302 Found"),
    "switching": reply(b"", status="101 Switching Protocols"),
    "deep JSON": reply(b"[" * 2**20),
    "a long number": reply(b"9" * 2**20),
    "another charset": reply("é".encode("utf-16")),
    "no HTTP": lambda connection, n: connection.sendall(b"\x00" * 70_000),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_is_one_clear_line(wire, flood):
    """What is not a whole, well-formed answer must never be a document, nor a traceback, nor take long."""
    w = wire(FLOODS[flood])
    if flood in ("a length that is none", "a negative length"):  # read to the end of the connection: whole
        server = Server(f"http://127.0.0.1:{w.port}", "a server", limit=LIMIT)
        assert server.ask(retrieved)[0][0] == "Lima"
        return
    _, seconds = fails(f"http://127.0.0.1:{w.port}")
    assert seconds < 1.1 * LIMIT + SLACK


def test_500_then_success_and_429_that_asks_to_wait(wire):
    """A server that starts up, or is busy, is no failure."""
    acts = [reply(b"", status="500 x"), reply(b"", "Retry-After: 0\r\n", "429 x"), reply(GOOD)]
    w = wire(lambda connection, n: acts[min(n, 3) - 1](connection, n))
    assert "Lima" in ask(open_search(f"http://127.0.0.1:{w.port}", limit=9), "x") and w.accepted == 3


def test_a_thousand_requests_at_once_each_end_in_time(wire):
    """A step's episodes all search at once: none may be lost, and a stalled server fails all within the limit
    of one, once for each turn of `parallel` requests."""
    w = wire(reply(GOOD))
    server = Server(f"http://127.0.0.1:{w.port}", "a server", limit=30)
    futures = [server.submit(server.ask, retrieved) for _ in range(1000)]
    assert not wait(futures, 60).not_done and all(f.result()[0][0] == "Lima" for f in futures)
    stalled = wire(lambda connection, n: None)
    stalled.speak = lambda connection, n: stalled.over.wait(30)
    server = Server(f"http://127.0.0.1:{stalled.port}", "a server", limit=1.0, parallel=1000)
    began = time.monotonic()
    futures = [server.submit(server.ask, retrieved) for _ in range(1000)]
    assert not wait(futures, 30).not_done and all(isinstance(f.exception(), ServerError) for f in futures)
    assert time.monotonic() - began < 10  # threads of one busy machine: not a measurement of the limit
