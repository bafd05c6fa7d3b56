"""A stand-in for SGLang's server that never finishes an answer, and a client of it that waits.

    python -m tests.rollout.stand_in_server serve PORT
    python -m tests.rollout.stand_in_server ask URL MODEL

The server is the standard library's; it computes nothing. The client is ours, and says on stderr
when it has begun to ask, and what ended it.
"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIMIT_S = 4.0  # without a sign of life


def serve(port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/generate":
                print("asked", file=sys.stderr, flush=True)
                time.sleep(1000)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("", port), Handler) as server:
        print("serving", file=sys.stderr, flush=True)
        server.serve_forever()


def ask(url: str, model: str) -> None:
    import numpy as np

    from moe_upgrpo.errors import MachineFault
    from moe_upgrpo.rollout.base import SamplingConfig
    from moe_upgrpo.rollout.sglang import SGLangEngine

    engine = SGLangEngine(model, url=url, timeout=LIMIT_S)
    print("asking", file=sys.stderr, flush=True)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=4)
    try:
        engine.generate([np.arange(2, 5)], sampling, samples_per_prompt=1, seed=0)
    except MachineFault as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        ask(*sys.argv[2:])
