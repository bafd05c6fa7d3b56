"""A server in front of a real SGLang server that alters its answers: for faults it never shows."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def altering(url: str, alter: Callable[[dict], None]) -> Iterator[str]:
    """The URL of a proxy for `url`; `alter` changes, in place, every response it generated."""

    class Handler(BaseHTTPRequestHandler):
        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            request = urllib.request.Request(
                url + self.path,
                body,
                {n: v for n in ("Content-Type", "Authorization") if (v := self.headers.get(n))},
                method=self.command,
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    status, data = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, data = error.code, error.read()
            if self.path == "/generate" and status == 200:
                items = json.loads(data)
                for item in items:
                    alter(item)
                data = json.dumps(items).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = forward

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
