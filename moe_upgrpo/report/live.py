# SPDX-License-Identifier: Apache-2.0
"""A report served on this machine's loopback address, and renewed while its run goes on."""

import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from markupsafe import escape

from moe_upgrpo.errors import UserError
from moe_upgrpo.report.page import write_page
from moe_upgrpo.report.runs import load_runs
from moe_upgrpo.store import read_config, rows_so_far
from moe_upgrpo.store.run_folder import is_being_written
from moe_upgrpo.store.text import printable

POLL_S = 1.0
# The pause between two pages, in times of making one: following uses no more of a machine.
IDLE_SHARE = 4
LINGER_S = 5.0  # for browsers to fetch the last page

_SCRIPT = (Path(__file__).parent / "live.js").read_text(encoding="utf-8")
# Only the page's own script may run, by a number that nothing in a run folder can know.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{}'; img-src data:; "
    "connect-src 'self'"
)


@dataclass
class _Served:
    """The newest page, and whether it is the last one."""

    page: bytes = b""
    version: int = 0
    ended: bool = False
    nonce: str = field(default_factory=secrets.token_urlsafe)
    key: str = field(default_factory=secrets.token_urlsafe)  # other users reach the port too
    lock: threading.Lock = field(default_factory=threading.Lock)

    def show(self, html: str, *, ended: bool) -> None:
        with self.lock:
            self.version += 1
            about = json.dumps({"version": self.version, "ended": ended})
            script = (
                f'<script nonce="{self.nonce}">const live = {about};\n{_SCRIPT}</script>\n</body>'
            )
            self.page = html.replace("</body>", script).encode()
            self.ended = ended

    def answer(self, path: str) -> tuple[bytes, str] | None:
        with self.lock:
            if path == f"/{self.key}/":
                return self.page, "text/html; charset=utf-8"
            if path == f"/{self.key}/version":
                about = {"version": self.version, "ended": self.ended}
                return json.dumps(about).encode(), "application/json"
        return None


def follow(run: Path, output: Path, *, port: int = 0, say: Callable[[str], None] = print) -> None:
    """Serve a run's page until the run has ended, and also write each page to ``output``.

    A run has ended once no process holds its lock or, if it has no lock, with its last step.

    Args:
        port: 0 takes any that is free.

    Raises:
        UserError: no run folder, or a port that cannot be taken.
    """
    read_config(run)
    served = _Served()
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(served))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be taken ({error.strerror}): name another by --port, or none for "
            "any that is free."
        ) from None
    except OverflowError:
        raise UserError(f"port {port}: from 0 to 65535 is needed.") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        served.show(_waiting(run, "its first page is being made"), ended=False)
        address = f"http://127.0.0.1:{server.server_port}/{served.key}/"
        say(f"{address} follows {run} (Ctrl-C ends it)")
        _renew(run, output, served)
        say(f"the run has ended; report: {output}")
        time.sleep(LINGER_S)
    finally:
        server.shutdown()
        server.server_close()


def _renew(run: Path, output: Path, served: _Served) -> None:
    seen: object = "nothing"
    not_before = 0.0
    while True:
        ended = has_ended(run)  # read first, so that the page has all that was written before
        state = _state(run)
        if ended or (state != seen and time.monotonic() >= not_before):
            begin, seen = time.monotonic(), state
            try:
                html = write_page(load_runs([run]), output).read_text(encoding="utf-8")
            except UserError as error:
                if ended:
                    raise
                html = _waiting(run, str(error))
            served.show(html, ended=ended)
            not_before = time.monotonic() + IDLE_SHARE * (time.monotonic() - begin)
        if ended:
            return
        time.sleep(POLL_S)


def _state(run: Path) -> tuple[int, ...]:
    """State of the metrics and the token files' names: a step's rows may follow its metrics."""
    found = []
    for path in (run / "metrics.jsonl", run / "tokens"):
        with suppress(OSError):
            found += [path.stat().st_size, path.stat().st_mtime_ns]
    return tuple(found)


def has_ended(run: Path) -> bool:
    """Whether nobody writes to the run folder any more."""
    writes = is_being_written(run)
    if writes is not None:
        return not writes
    # From an older version, or a probe: no process ever held a lock.
    config = read_config(run)
    rows = rows_so_far(run)
    if str(config.get("loss", "")).startswith("none"):
        return bool(rows)
    steps = config.get("steps")
    return isinstance(steps, int) and bool(rows) and rows[-1]["step"] >= steps


def _waiting(run: Path, why: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>moe_upgrpo</title>'
        '<meta name="color-scheme" content="light dark"></head>\n'
        f"<body><main><h1>{escape(printable(run.resolve().name))}</h1>"
        f"<p>No page yet: {escape(printable(why))}.</p>"
        "</main>\n</body></html>\n"
    )


def _handler(served: _Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's name may resolve to this machine: answer only to our own names.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            found = served.answer(self.path) if host in ("127.0.0.1", "localhost") else None
            if found is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body, kind = found
            self.send_response(HTTPStatus.OK)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("Content-Security-Policy", _POLICY.format(served.nonce)),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Print nothing: requests are not news."""

    return Handler
