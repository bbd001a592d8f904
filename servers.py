"""JSON over HTTP: a time limit, a few retries, and one clear line when it fails.

A `Server` is asked for JSON. A `Chat` is a client of an OpenAI-compatible server (vLLM, SGLang): a simulator
that is too large for this GPU runs there. Requests run in threads of their own and give futures, so that the
engine of rollout.py goes on decoding. Two promises: a request ends within `limit` seconds, retries and pauses
included; and what is not a whole, well-formed answer is a `ServerError`, never a text that is trained on.

It deliberately is not: a session (each request has its own connection), a stream, a follower of redirects
(they could carry a key elsewhere). Looking up a host's name has the system's own time limit.

    chat = Chat("http://127.0.0.1:8000/v1")
    chat.complete([{"role": "user", "content": "Who wrote Emma?"}], 0.8, max_tokens=50, seed=0).result()

Proxies of the environment are used (without their passwords), but never for this machine.
"""

import http.client
import ipaddress
import json
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
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


class Passing(Exception):
    """A fault that may pass. wait: seconds for which the server asked to be left alone."""

    def __init__(self, fault: str, wait: int = 0):
        super().__init__(fault)
        self.wait = wait


def one_line(text: str, most: int = 10_000) -> str:
    """Foreign text as data: white space collapsed, no control characters, no half surrogates, `most` long."""
    return " ".join(UNSEEN.sub("", text).split())[:most]


class Server:
    """A place to ask for JSON.

    address   http(s)://HOST:PORT/PATH
    kind      what ought to be there, for errors
    key       a secret that no error may show; whoever needs it puts it into a header or a path
    limit     seconds of a request, all tries together; one try may take a third of it
    parallel  requests at the same time; others wait for their turn, and their time does not run yet
    """

    def __init__(
        self,
        address: str,
        kind: str,
        key: str = "",
        headers: dict[str, str] | None = None,
        limit: float = 60.0,
        parallel: int = 32,
    ):
        self.scheme, self.host, self.port, self.path = _parts(address)
        self.address, self.kind, self.limit = address.rstrip("/"), kind, limit
        self.secrets = {key, quote(key), quote_plus(key), key.replace("/", "\\/")} - {""}
        self.headers = {"Content-Type": "application/json", "Connection": "close"} | (headers or {})
        self.proxy = None if _is_here(self.host) or proxy_bypass(self.host) else getproxies().get(self.scheme)
        self.waiting: deque[Callable[[], None]] = deque()
        self.threads, self.parallel, self.lock = 0, parallel, threading.Lock()

    def submit(self, work: Callable[..., Value], *arguments) -> Future[Value]:
        """Do work in one of `parallel` threads, for which no exit waits (an executor's are joined at exit).

        A future cancelled before its turn is never begun.
        """
        future: Future[Value] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*arguments))
                except Exception as e:  # it belongs to whoever waits for the future
                    future.set_exception(e)

        with self.lock:
            self.waiting.append(run)
            if self.threads < self.parallel:
                self.threads += 1
                threading.Thread(target=self._serve, daemon=True).start()
        return future

    def _serve(self) -> None:
        """A thread's life: whatever waits, one after the other."""
        while True:
            with self.lock:
                if not self.waiting:
                    self.threads -= 1
                    return
                run = self.waiting.popleft()
            run()

    def ask(
        self,
        read: Callable[[object], Value],
        path: str = "",
        body: dict | None = None,
        limit: float | None = None,
    ) -> Value:
        """GET address + path, or POST where there is a body; blocks; returns `read` of the answer's JSON.

        `read` raises ValueError, "what is wrong", for an answer of another shape. Raises ServerError.
        """
        limit, began = limit or self.limit, time.monotonic()
        for n in range(1, TRIES + 1):
            left = began + limit - time.monotonic()
            try:
                return self._value(read, path, body, min(left, limit / 3))
            except Passing as e:
                pause = max(e.wait, PAUSE * 2 ** (n - 1))
                if n == TRIES or time.monotonic() + pause >= began + limit:
                    fault = f"{e}{f', and asks to wait {e.wait} s' if e.wait else ''}"
                    tries = f"{n} {'try' if n == 1 else 'tries'} in {time.monotonic() - began:.1f} s"
                    advice = f"{tries}. See that {self.kind} runs there, then run again"
                    raise self._error(path, fault, advice) from None
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _value(self, read: Callable[[object], Value], path: str, body: dict | None, seconds: float) -> Value:
        """One try. Raises Passing or ServerError."""
        address = f"Is that the address of {self.kind}?"
        try:
            response, data = self._exchange(path, body, seconds)
        except (OSError, http.client.HTTPException, UnicodeError) as e:
            fault = f"no such host ({e})" if isinstance(e, (socket.gaierror, UnicodeError)) else repr(e)
            raise self._error(path, fault, address) from None
        said = f": {data.decode('utf-8', 'replace')}" if data else ", without a word"
        fault = f"answered {response.status} {response.reason}{said}"
        if response.status == 429 or response.status >= 500:
            raise Passing(fault, _retry_after(response))
        if response.status in (401, 403):
            raise self._error(path, fault, "Check the key in the environment")
        if response.status >= 300:
            raise self._error(path, fault, address)
        if len(data) > LARGEST:
            raise self._error(path, f"answered more than {LARGEST // 2**20} MiB", address)
        try:
            return read(json.loads(data))
        except (ValueError, RecursionError) as e:
            shape = type(e) is ValueError and str(e)
            raise self._error(path, f"answered {shape or 'no JSON'}{said}", address) from None

    def _exchange(
        self, path: str, body: dict | None, seconds: float
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send and receive. Raises Passing where a connection is refused, lost, or too slow."""
        connection, deadline = self._connection(seconds), time.monotonic() + seconds
        target = (self.address if self.proxy and self.scheme == "http" else self.path) + path
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.connect()
            with _hang_up_at(deadline, connection.sock):
                connection.request("GET" if body is None else "POST", target or "/", data, self.headers)
                response = connection.getresponse()
                data = response.read(LARGEST + 1)
            if time.monotonic() >= deadline:
                raise TimeoutError
            if response.length and len(data) <= LARGEST:
                raise http.client.IncompleteRead(data)
            return response, data
        except (OSError, http.client.HTTPException) as e:
            late = isinstance(e, TimeoutError) or time.monotonic() >= deadline
            if fault := f"gave no whole answer within {seconds:.1f} s" if late else _passing(e):
                raise Passing(fault) from None
            raise
        finally:
            connection.close()

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        if not self.proxy:
            return kind(self.host, self.port, timeout=seconds)
        proxy = urlsplit(self.proxy if "//" in self.proxy else f"//{self.proxy}")
        connection = kind(proxy.hostname, proxy.port or 80, timeout=seconds)
        if self.scheme == "https":
            connection.set_tunnel(self.host, self.port)
        return connection

    def _error(self, path: str, fault: str, advice: str) -> ServerError:
        """No secret leaves here: neither the path's parameters, nor a key that the server says back to us."""
        where, fault = self.address + path.partition("?")[0], one_line(fault, 2 * LARGEST)
        for secret in sorted(self.secrets, key=len, reverse=True):
            fault = fault.replace(secret, "***")
        return ServerError(f"{where}: {fault[:300]}. {advice}")


def _parts(address: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path. Raises ValueError."""
    shown = "an address with a password" if "@" in address else repr(address)
    wrong = ValueError(f"{shown} cannot be used: write http://HOST:PORT or https://HOST/PATH")
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise wrong from None
    plain = re.fullmatch(r"[!-~]+", address) and not set("@?#") & set(address)
    if not plain or not parts.hostname:
        raise wrong
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        ip = ipaddress.ip_address(host)
        return ip.is_loopback or ip.is_unspecified
    return host == "localhost"


@contextmanager
def _hang_up_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """End whatever waits for a socket: its own time limit starts again with every byte that trickles in."""

    def hang_up() -> None:
        with suppress(OSError):  # it may be closed by now
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    alarm = threading.Timer(max(0.0, deadline - time.monotonic()), hang_up)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _passing(e: Exception) -> str:
    """What happened, if it may pass; else ""."""
    if isinstance(e, ConnectionRefusedError):
        return "refused the connection"
    if isinstance(e, (ConnectionError, http.client.IncompleteRead)):
        return "broke off the connection before its answer was whole"
    unknown = isinstance(e, socket.gaierror) and e.errno == socket.EAI_AGAIN
    return str(e.strerror) if unknown else ""


def _retry_after(response: http.client.HTTPResponse) -> int:
    """Seconds, where the header tells them; a date is passed over, for clocks differ."""
    told = response.headers.get("Retry-After", "")
    return int(told) if re.fullmatch("[0-9]{1,6}", told) else 0


def is_address(name: str | None) -> bool:
    """Whether a name is a server's address, and not a body's."""
    return (name or "").startswith(("http://", "https://"))


def environment_key(name: str) -> str:
    """A key from the environment, "" where there is none. Raises ValueError for what no header can hold."""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(f"{name} in the environment is not a key: it holds a blank or a foreign letter")
    return key


# ------------------------------------------------------------------------------------------------------- chat


class Chat:
    """A language model behind an OpenAI-compatible server; its key, if any, stands in OPENAI_API_KEY.

    address: up to and with /v1. model: a name the server knows; "" asks it for its first. Raises ValueError
    for an address that is none, ServerError where the server has to be asked and fails.
    """

    def __init__(self, address: str, model: str = "", limit: float = 600.0, parallel: int = 128):
        key = environment_key("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.server = Server(address, "an OpenAI-compatible server", key, headers, limit, parallel)
        self.model = model or self.server.ask(_first_model, "/models", limit=min(limit, 30.0))

    def complete(
        self,
        messages: list[dict[str, str]],
        temperature: float,
        max_tokens: int,
        seed: int,
        stops: Sequence[str] = (),
    ) -> Future[str]:
        """What the model says next, in lines without control characters; the future may raise ServerError.

        messages: [{"role", "content"}]. seed: a wish; not every server repeats itself.
        """
        body = {
            **{"model": self.model, "messages": messages, "temperature": temperature, "top_p": 1.0},
            **{"max_tokens": max_tokens, "seed": seed},
            **({"stop": list(stops)} if stops else {}),
        }
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
