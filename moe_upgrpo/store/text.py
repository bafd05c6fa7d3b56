# SPDX-License-Identifier: Apache-2.0
"""Make others' text safe for a page or a terminal."""

from typing import Any


def _shown_as() -> dict[int, str]:
    controls = {c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\t\n\r"}
    controls[0x7F] = "␡"
    # C1 controls, halves of surrogate pairs, reversals of the direction of what follows, and
    # non-characters.
    others = (*range(0x80, 0xA0), *range(0xD800, 0xE000), *range(0x202A, 0x202F),
              *range(0x2066, 0x206A), 0xFFFE, 0xFFFF)  # fmt: skip
    return controls | dict.fromkeys(others, "�")


_SHOWN_AS = _shown_as()


def printable(value: Any) -> Any:
    """A JSON ``value`` without control characters in its texts and names: ␀ for NUL, ␛ for an
    escape, � for what has no sign. Lines and tabs stay."""
    if isinstance(value, str):
        return value if value.isprintable() else value.translate(_SHOWN_AS)
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value
