"""A real HTTP server of the standard library on this machine's loopback."""

import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(answer):
    """The URL of a server whose `answer(handler, body)` gives a status and bytes.

    None in their place: the connection is closed without an answer.
    """

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if (given := answer(self, body)) is None:
                return
            status, data = given
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = reply

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # with the default of 5 Linux resets some of many at once

        def handle_error(self, request, client_address):
            if not isinstance(sys.exception(), ConnectionError):  # the client may go away
                super().handle_error(request, client_address)

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
