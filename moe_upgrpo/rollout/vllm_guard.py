# SPDX-License-Identifier: Apache-2.0
"""A vLLM server's key on all of its paths: `--middleware moe_upgrpo.rollout.vllm_guard.RequireKey`.

vLLM 0.32 asks for `VLLM_API_KEY` under /v1, /v2, /inference and /cohere alone
(serve/middleware/authenticate.py:11): the development endpoints, which load any weights and call
any method of a worker on request, answer everybody.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health",)  # says only that the server is up
VARIABLE = "VLLM_API_KEY"


class RequireKey:
    """ASGI middleware that answers 401 to requests without the key."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app
        key = os.environ.get(VARIABLE)
        if not key:
            raise RuntimeError(f"{VARIABLE} is not set: RequireKey has no key to ask for.")
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            kind = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": kind})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _allows(self, scope: dict[str, Any]) -> bool:
        if scope["path"] in OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)
