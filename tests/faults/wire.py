"""A server that says what it likes, and a thousand requests to it at once.

python -m tests.faults --long --only flood      # every kind of answer, 1,000 times, within 1.1 of the limit
"""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable

from search import retrieved
from servers import Server, ServerError

GOOD = json.dumps({"result": [[{"contents": "Lima\nLima is the capital of Peru."}]]}).encode()


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


def reply(data: bytes, head: str = "", status: str = "200 OK", length: object = None) -> Callable:
    """Read a request, then answer it."""

    def speak(connection: socket.socket, number: int) -> None:
        connection.recv(65536)
        size = len(data) if length is None else length
        first = f"HTTP/1.1 {status}\r\n{head}Content-Length: {size}\r\n\r\n"
        connection.sendall(first.encode() + data)

    return speak


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
    "no JSON": reply(b"<html>Bad gateway</html>"),
    "no HTTP": lambda connection, n: connection.sendall(b"\x00" * 70_000),
}
WHOLE = ("a length that is none", "a negative length")  # read to the end of the connection: an answer
SLOW = {
    "stalls": lambda w: lambda connection, n: w.over.wait(600),
    "trickles": lambda w: w.trickle(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999),
}
HANDSHAKES = {
    "says nothing": lambda w: lambda connection, n: w.over.wait(600),
    "trickles a record": lambda w: w.trickle(b"\x16\x03\x03\x40\x00" + b"\x02" * 16384),
}
PASSING = {
    "500, then an answer": reply(b"", status="500 x"),
    "429 that asks to wait, then an answer": reply(b"", "Retry-After: 1\r\n", "429 x"),
}


def flood(name: str, n: int, limit: float) -> tuple[int, list[str], str]:
    """n requests at once -> n, each one that ended in another way than it had to, or later than 1.1 of the
    limit; and the slowest. (Those that are answered at once, or in megabytes, take turns of 32.)"""
    wire, good = Wire(lambda *a: None), reply(GOOD)
    scheme, parallel, wanted = "http", 32, name in (*WHOLE, *PASSING)
    if name in SLOW | HANDSHAKES:
        wire.speak, parallel = (SLOW | HANDSHAKES)[name](wire), n
        scheme = "https" if name in HANDSHAKES else "http"
    elif name in PASSING:
        seen: set[bytes] = set()

        def speak(connection: socket.socket, number: int) -> None:
            path = connection.recv(65536, socket.MSG_PEEK).split()[1]
            (good if path in seen else PASSING[name])(connection, number)
            seen.add(path)

        wire.speak = speak
    else:
        wire.speak = FLOODS[name]
    server = Server(f"{scheme}://127.0.0.1:{wire.port}", "a server", limit=limit, parallel=parallel)

    def timed(i: int) -> tuple[bool, float]:
        began = time.monotonic()
        try:
            return server.ask(retrieved, f"/{i}")[0][0] == "Lima", time.monotonic() - began
        except ServerError:
            return False, time.monotonic() - began

    began = time.monotonic(), time.process_time()
    ends = [future.result() for future in [server.submit(timed, i) for i in range(n)]]
    wire.close()
    wrong = [
        f"{'an' if ok else 'no'} answer after {s:.1f} s" for ok, s in ends if ok != wanted or s > 1.1 * limit
    ]
    wall, own = time.monotonic() - began[0], time.process_time() - began[1]
    slowest = f"the slowest took {max(s for _, s in ends) / limit:.3f} of {limit:g} s"
    return n, wrong, f"{slowest}; {own:.1f} s of a processor in {wall:.1f} s"
