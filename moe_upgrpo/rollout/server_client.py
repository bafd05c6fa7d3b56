# SPDX-License-Identifier: Apache-2.0
"""The HTTP client of engines that are servers: one question, or many at once.

It uses the standard library, so that a process that only asks needs none of a server's packages. A
proxy named in the environment is meant for other addresses, and is not used.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.rollout.server_key import headers, refused

KINDS = {"http": HTTPConnection, "https": HTTPSConnection}
MAX_REQUESTS = 256  # at once
SHOWN = 2000  # characters of a refusal

Ask = Callable[[Any, list[HTTPConnection]], Any]


class _Lost(Exception):
    """An exchange that the server did not finish: a MachineFault before the log is added."""


class ServerClient:
    """Ask the server `name` at `url`, with its key.

    Every fault is one error that names the server, the path and what to do: UserError where the
    request is refused, MachineFault where the server is gone, late or broken.

    key_variable: where the key comes from, for errors.
    late: the error for a request that was not answered in time; may name {path} and {timeout}.
    unknown: what to do where the server does not know a path, or forbids it.
    log: what the server's log says, or where it is, at the end of a MachineFault.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        key: str | None,
        key_variable: str,
        late: str,
        unknown: str = "",
        log: Callable[[], str] = lambda: " See its log.",
    ):
        try:
            parts = urlsplit(url)
            usable = parts.scheme in KINDS and parts.hostname and parts.port != 0
        except ValueError:  # for example a port that is not a number
            usable = False
        if not usable:
            raise UserError(f"url is {url!r}; http://HOST:PORT is needed.")
        self.url, self._parts = url.rstrip("/"), parts
        self._name, self._server = name, f"{name} at {self.url}"
        self._key, self._key_variable = key, key_variable
        self._late, self._unknown, self.log = late, unknown, log
        self._asking: list[list[HTTPConnection]] = []  # connections of each `answers`

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        timeout: float,
        opened: list[HTTPConnection] | None = None,
    ) -> Any:
        """The server's answer to a GET, or to a POST of `body`: its JSON, None if empty.

        Each wait, for the connection and for the next bytes, takes at most `timeout` seconds. The
        connection is added to `opened` before it is used, so that `answers` can cut it.
        """
        try:
            text = self._exchange(path, body, timeout, opened)
        except _Lost as lost:
            if opened is not None:
                raise  # `answers` looks into the log once, not each of its threads
            raise self._fault(lost) from lost.__cause__
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise UserError(
                f"{self._server} answered {path} with no JSON: "
                f"{text.decode(errors='replace')[:200]!r}. Is the url that of another server?"
            ) from None

    def is_alive(self, timeout: float, path: str = "/health") -> bool:
        """Whether it answers a GET with success within `timeout` seconds, whatever the content."""
        try:
            self._exchange(path, None, timeout)
        except (UserError, _Lost):
            return False
        return True

    def _fault(self, lost: _Lost) -> MachineFault:
        return MachineFault(f"{lost}.{self.log()}")

    def _exchange(
        self, path: str, body: Any, timeout: float, opened: list[HTTPConnection] | None = None
    ) -> bytes:
        connection = KINDS[self._parts.scheme](
            self._parts.hostname, self._parts.port, timeout=timeout
        )
        if opened is not None:
            opened.append(connection)
        try:
            connection.request(
                "GET" if body is None else "POST",
                self._parts.path.rstrip("/") + path,
                None if body is None else json.dumps(body),
                headers(self._key),
            )
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, HTTPException) as error:
            what = (
                self._late.format(path=path, timeout=f"{timeout:g}")
                if isinstance(error, TimeoutError)
                else "is not there (any more)"
            )
            raise _Lost(f"{self._server} {what}: {error!r}") from error
        finally:
            connection.close()
        if answer.status == 401:
            raise refused(self._server, self._key, self._key_variable)
        if not 200 <= answer.status < 300:
            said = text.decode(errors="replace")[:SHOWN]
            hint = f". {self._unknown}" if answer.status in (403, 404) and self._unknown else ""
            raise (MachineFault if answer.status >= 500 else UserError)(
                f"{self._name} refused {path} ({answer.status}) at {self.url}: {said}{hint}"
            )
        return text

    def answers(
        self, ask: Ask, bodies: Sequence[Any], *, beat: float
    ) -> Iterator[tuple[int, Any] | None]:
        """Send all at once (up to `MAX_REQUESTS`); yields (i, answer to body i) as each arrives.

        Yields None after `beat` seconds without an answer: time to see whether the server lives.
        `ask` gets a body and the `opened` of `call`; its errors are raised here. However the
        iteration ends, nothing more is asked and open connections are cut, so that the server can
        drop requests that nobody waits for: `contextlib.closing` ends it early.
        """
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        arrived: queue.SimpleQueue = queue.SimpleQueue()
        opened: list[HTTPConnection] = []
        self._asking.append(opened)
        for item in enumerate(bodies):
            waiting.put(item)

        def work() -> None:
            with suppress(queue.Empty):
                while True:
                    i, body = waiting.get_nowait()
                    try:
                        arrived.put((i, ask(body, opened), None))
                    except Exception as error:
                        arrived.put((i, None, error))
                        return

        for _ in range(min(len(bodies), MAX_REQUESTS)):
            # Not a pool, whose threads a dying process would wait for.
            threading.Thread(target=work, daemon=True).start()
        try:
            left = len(bodies)
            while left:
                try:
                    i, answer, error = arrived.get(timeout=beat)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(error, _Lost):
                    raise self._fault(error) from error.__cause__
                if error is not None:
                    raise error
                left -= 1
                yield i, answer
        finally:
            with suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
            self._asking.remove(opened)
            _cut(opened)

    def cut(self) -> None:
        """Cut the connections of every `answers`, which then raises a MachineFault."""
        for opened in list(self._asking):
            _cut(opened)


def _cut(opened: list[HTTPConnection]) -> None:
    for connection in list(opened):
        if (used := connection.sock) is not None:
            with suppress(OSError):
                used.shutdown(socket.SHUT_RDWR)
