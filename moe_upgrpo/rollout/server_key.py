# SPDX-License-Identifier: Apache-2.0
"""The key that an engine's server asks for: from the environment, never on a command line.

`ps` shows the command lines of all users, but the environment only of one's own processes.
"""

from __future__ import annotations

import os
import secrets

from moe_upgrpo.errors import UserError


def read_key(variable: str, given: str | None = None) -> str | None:
    """The key `given`, else the one in the environment; None where there is neither."""
    key = given if given is not None else os.environ.get(variable)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UserError(
            f"the server's key ({variable}) is empty or has characters that cannot be sent: "
            "printable ASCII is needed, without blanks at its ends."
        )
    return key


def new_key() -> str:
    return secrets.token_urlsafe(32)


def headers(key: str | None) -> dict[str, str]:
    """Headers of a request with a JSON body."""
    return {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )


def refused(server: str, key: str | None, variable: str) -> UserError:
    """The error where a server answers 401."""
    what = "asks for another key than it was given" if key else "asks for a key, and got none"
    return UserError(
        f"{server} {what}: set {variable} to the same value where the server is started and where "
        "the trainer is."
    )
