"""JSON over HTTP with a time limit, a few retries, and one clear line on failure.

A `Server` is asked for JSON. A `Chat` is a client of an OpenAI-compatible server (vLLM, SGLang), for a
simulator too large for this GPU. Requests run in threads and give futures, so that the engine of rollout.py
goes on decoding. Two promises: a request ends within `limit` seconds, retries and pauses included; and
whatever is not a complete, well-formed answer is a `ServerError`, never a text to train on.

Not a session (a connection serves one request); no streaming, no redirects (they might carry a key away).
Resolving a host name has the system's own time limit. Proxies of the environment are used (without their
passwords), but never for this machine.

    chat = Chat("http://127.0.0.1:8000/v1")
    chat.complete([{"role": "user", "content": "Who wrote Emma?"}], 0.8, max_tokens=50, seed=0).result()
"""

import http.client
import ipaddress
import itertools
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from http.client import HTTPException, HTTPResponse, IncompleteRead
from queue import SimpleQueue
from threading import Semaphore
from typing import TypeVar
from urllib.parse import quote, quote_plus, urlsplit
from urllib.request import getproxies, proxy_bypass

Value = TypeVar("Value")
TRIES = 4  # of a request, where the fault may pass
PAUSE = 0.5  # seconds before the second try; each further one waits twice as long
LARGEST = 2**24  # bytes of an answer
UNSEEN = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # control characters but white space


class ServerError(OSError):
    """A server failed: one line with its address, what happened, and what to do."""


@dataclass(eq=False)
class Passing(Exception):
    """A fault that may pass."""

    fault: str
    wait: int = 0  # seconds for which the server asked to be left alone


def one_line(text: str, most: int = 10_000) -> str:
    """Foreign text as data: single spaces, no control characters or half surrogates, `most` long."""
    return " ".join(UNSEEN.sub("", text).split())[:most]


@dataclass(eq=False, repr=False)  # a repr would show the key
class Server:
    """A place to ask for JSON. Raises ValueError for an address that cannot be used."""

    address: str  # http(s)://HOST:PORT/PATH
    kind: str  # what ought to be there, for errors
    key: str = ""  # a secret that no error may show; the caller puts it into a header or a path
    headers: dict[str, str] = field(default_factory=dict)
    limit: float = 60.0  # seconds of a request, all tries together; one try may take a third of it
    parallel: int = 32  # requests at a time; others wait for their turn, and their time does not run yet

    def __post_init__(self):
        self.scheme, self.host, self.port, self.path = _parts(self.address)
        self.address = self.address.rstrip("/")
        self.secrets = {self.key, quote(self.key), quote_plus(self.key), self.key.replace("/", "\\/")} - {""}
        self.headers = {"Content-Type": "application/json", "Connection": "close"} | self.headers
        proxy = "" if _is_here(self.host) or proxy_bypass(self.host) else getproxies().get(self.scheme)
        self.proxy = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else None
        self.work, self.free, self.served = SimpleQueue(), Semaphore(self.parallel), False
        self.tls = {}  # one context for all connections: each would read the authorities anew, 20 ms
        if self.scheme == "https":
            self.tls["context"] = ssl.create_default_context()
            self.tls["context"].set_alpn_protocols(["http/1.1"])  # as http.client's own

    def submit(self, work: Callable[..., Value], *arguments) -> Future[Value]:
        """Do work in one of `parallel` threads. A future cancelled before its turn is never begun.

        (Not an executor: Python waits for its threads at exit, and a stuck request would hold the GPU.)
        Raises ServerError where not even one thread can be started.
        """
        if self.free.acquire(blocking=False):
            try:
                _started(self._serve)
                self.served = True
            except Passing as e:
                self.free.release()  # the threads that there are do the work
                if not self.served:
                    raise self._error("", e.fault, "End other programs, then run again") from None
        future: Future[Value] = Future()
        self.work.put((future, partial(work, *arguments)))
        return future

    def _serve(self) -> None:
        while True:
            future, work = self.work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as e:  # it belongs to whoever waits for the future
                    future.set_exception(e)

    def ask(
        self, read: Callable[[object], Value], path: str = "", body: dict | None = None, limit: float = 0.0
    ) -> Value:
        """GET address + path, or POST a body, and wait: `read` of the answer's JSON. Raises ServerError.

        `read` raises ValueError, "what is wrong", for an answer of another shape. limit: 0 is the server's.
        """
        limit, began = limit or self.limit, time.monotonic()
        for n in itertools.count(1):
            left = began + limit - time.monotonic()
            try:
                return self._value(read, path, body, min(left, limit / 3))
            except Passing as e:
                spent, pause = time.monotonic() - began, max(e.wait, PAUSE * 2 ** (n - 1))
                over = n == TRIES or spent + pause >= limit
                if not over:
                    time.sleep(pause)
                if over or time.monotonic() >= began + limit:  # a busy machine sleeps for longer
                    fault = e.fault + (f", and asks to wait {e.wait} s" if e.wait else "")
                    tries = f"{n} {'try' if n == 1 else 'tries'} in {spent:.1f} s"
                    advice = f"{tries}. See that {self.kind} runs there, then run again"
                    raise self._error(path, fault, advice) from None

    def _value(self, read: Callable[[object], Value], path: str, body: dict | None, seconds: float) -> Value:
        """One try. Raises Passing or ServerError."""
        address = f"Is that the address of {self.kind}?"
        try:
            response, data = self._exchange(path, body, seconds)
        except (OSError, HTTPException, UnicodeError) as e:
            fault = f"no such host ({e})" if isinstance(e, (socket.gaierror, UnicodeError)) else repr(e)
            raise self._error(path, fault, address) from None
        said = f": {data.decode('utf-8', 'replace')}" if data else ", without a word"
        fault = f"answered {response.status} {response.reason}{said}"
        if response.status == 429 or response.status >= 500:
            wait = response.headers.get("Retry-After", "")  # a date is ignored, since clocks differ
            raise Passing(fault, int(wait) if re.fullmatch("[0-9]{1,6}", wait) else 0)
        if response.status >= 300:
            key = response.status in (401, 403)
            raise self._error(path, fault, "Check the key in the environment" if key else address)
        if len(data) > LARGEST:
            raise self._error(path, f"answered more than {LARGEST // 2**20} MiB", address)
        try:
            return read(json.loads(data))
        except (ValueError, RecursionError) as e:
            shape = type(e) is ValueError and str(e)
            raise self._error(path, f"answered {shape or 'no JSON'}{said}", address) from None

    def _exchange(self, path: str, body: dict | None, seconds: float) -> tuple[HTTPResponse, bytes]:
        """Send and receive. Raises Passing where a connection is refused, lost, or too slow."""
        deadline, secure, via = time.monotonic() + seconds, self.scheme == "https", self.proxy
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        host, port = (via.hostname, via.port or 80) if via else (self.host, self.port)
        connection = kind(host, port, timeout=seconds, **self.tls)
        if via and secure:
            connection.set_tunnel(self.host, self.port)
        target = (self.address if via and not secure else self.path) + path or "/"
        data = None if body is None else json.dumps(body).encode()
        twins: list[socket.socket] = []  # of the connection's socket, which a TLS handshake takes away
        # http.client's own hook; it is not public, and there is no other place between connecting and TLS
        connection._create_connection = partial(_connected, twins, deadline)
        try:
            _alarm.set(deadline, twins)
            connection.request("GET" if body is None else "POST", target, data, self.headers)
            response = connection.getresponse()
            data = response.read(LARGEST + 1)
            if time.monotonic() >= deadline:
                raise TimeoutError
            if response.length and len(data) <= LARGEST:
                raise IncompleteRead(data)
            return response, data
        except (OSError, HTTPException) as e:
            if isinstance(e, TimeoutError) or time.monotonic() >= deadline:
                fault = f"gave no whole answer within {seconds:.1f} s"
            elif isinstance(e, ConnectionRefusedError):
                fault = "refused the connection"
            elif isinstance(e, (ConnectionError, IncompleteRead)):
                fault = "broke off the connection before its answer was whole"
            elif isinstance(e, socket.gaierror) and e.errno == socket.EAI_AGAIN:
                fault = str(e.strerror)
            else:
                raise
            raise Passing(fault) from None
        finally:
            for sock in (connection, *twins):
                sock.close()
            twins.clear()

    def _error(self, path: str, fault: str, advice: str) -> ServerError:
        """An error without secrets: no parameters of the path, no key that the server echoes."""
        where, fault = self.address + path.partition("?")[0], one_line(fault, 2 * LARGEST)
        for secret in sorted(self.secrets, key=len, reverse=True):
            fault = fault.replace(secret, "***")
        return ServerError(f"{where}: {fault[:300]}. {advice}")


def _parts(address: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path. Raises ValueError."""
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not parts.hostname or not re.fullmatch('[!"$->A-~]+', address):  # printable, without # ? @
            raise ValueError
    except (ValueError, KeyError):
        shown = "an address with a password" if "@" in address else repr(address)
        wrong = f"{shown} cannot be used: write http://HOST:PORT or https://HOST/PATH"
        raise ValueError(wrong) from None
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        ip = ipaddress.ip_address(host)
        return ip.is_loopback or ip.is_unspecified
    return host == "localhost"


def _connected(twins: list, deadline: float, where: tuple[str, int], *_) -> socket.socket:
    """Connect to the first address of a host that answers in time; all share the deadline."""
    fault: OSError = TimeoutError()
    for *_, address in socket.getaddrinfo(*where, 0, socket.SOCK_STREAM):
        if (left := deadline - time.monotonic()) <= 0:
            break
        try:
            sock = socket.create_connection(address[:2], left)
            twins.append(sock.dup())
            if time.monotonic() < deadline:  # else who hangs up has been here already
                return sock
            sock.close()
        except OSError as e:
            fault = e
    raise fault


def _started(run: Callable[[], None]) -> threading.Thread:
    """A thread that Python does not wait for. Raises Passing where the system gives none."""
    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise Passing("no further thread can be started on this machine") from None
    return thread


class _Alarm:
    """One thread that hangs up whatever is late: the time limit of a socket starts again with every byte that
    trickles in. (A timer for each request would be a thousand threads, which wake at the same instant.)"""

    def __init__(self):
        self.waiting: list[tuple[float, int, list]] = []  # a heap: deadline, number, sockets
        self.changed, self.numbers, self.thread = threading.Condition(), itertools.count(), None

    def set(self, deadline: float, sockets: list) -> None:
        """Hang up these then; without a thread to do it, raise Passing.

        (The list of a request that has ended is empty, and stays until its time.)
        """
        with self.changed:
            if self.thread is None:
                self.thread = _started(self._run)  # where it cannot, the next request tries again
            heappush(self.waiting, (deadline, next(self.numbers), sockets))
            if self.waiting[0][2] is sockets:
                self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.waiting or (left := self.waiting[0][0] - time.monotonic()) > 0:
                    self.changed.wait(min(left, 3600.0) if self.waiting else None)  # no float is too large
                late = heappop(self.waiting)[2]
            for sock in [*late]:
                with suppress(OSError):  # it may be closed by now
                    sock.shutdown(socket.SHUT_RDWR)


_alarm = _Alarm()
os.register_at_fork(after_in_child=_alarm.__init__)  # no thread survives a fork


def is_address(name: str | None) -> bool:
    """Whether a name is a server's address, not a body's."""
    return (name or "").startswith(("http://", "https://"))


def environment_key(name: str) -> str:
    """A key from the environment, or "". Raises ValueError for one that no header can hold."""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(f"{name} in the environment is not a key: it holds a blank or a foreign letter")
    return key


# ------------------------------------------------------------------------------------------------------- chat


class Chat:
    """A language model behind an OpenAI-compatible server, with the key of OPENAI_API_KEY if that is set.

    address: up to /v1. model: a name that the server knows; "" asks for its first. Raises ValueError for an
    address that cannot be used, ServerError where the server is asked for its first model and fails.
    """

    def __init__(self, address: str, model: str = "", limit: float = 600.0, parallel: int = 128):
        key = environment_key("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.server = Server(address, "an OpenAI-compatible server", key, headers, limit, parallel)
        self.model = model or self.server.ask(_first_model, "/models", limit=min(limit, 30.0))

    def complete(
        self, messages: list[dict], temperature: float, max_tokens: int, seed: int, stops: Sequence[str] = ()
    ) -> Future[str]:
        """What the model says next, in lines without control characters; the future may raise ServerError.

        messages: [{"role", "content"}]. seed: a request; not every server repeats itself.
        """
        body = {"model": self.model, "messages": messages, "temperature": temperature, "top_p": 1.0}
        body |= {"max_tokens": max_tokens, "seed": seed} | ({"stop": list(stops)} if stops else {})
        return self.server.submit(self.server.ask, _said, "/chat/completions", body)


def _first_model(answer: object) -> str:
    match answer:
        case {"data": [{"id": str(name)}, *_]} if name:
            return name
    raise ValueError('no {"data": [{"id": ...}]}')


def _said(answer: object) -> str:
    match answer:
        case {"choices": [{"message": {"content": str(text)}} as choice, *_]}:
            if (why := choice.get("finish_reason")) not in (None, "stop", "length"):
                raise ValueError(f"an answer that was broken off: finish_reason {why!r}")
            return "\n".join(map(one_line, text.splitlines()))
    raise ValueError('no {"choices": [{"message": {"content": ...}}]}')
