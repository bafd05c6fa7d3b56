# SPDX-License-Identifier: Apache-2.0
"""Wrappers around the methods of a stack's class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def wrap(owner: type, name: str, around: Callable) -> None:
    """Have `around(original, self, ...)` called for the method; `original` is bound to self."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        return around(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, name, call)


def delegate(owner: type, attribute: str, names: Sequence[str]) -> None:
    """Wrap the owner's methods in those of the object at `attribute`, where that is not None.

    The object's methods have the same names and take `original` first.
    """

    def through(name: str) -> Callable:
        def around(original, self, *args, **kwargs):
            other = getattr(self, attribute)
            if other is None:
                return original(*args, **kwargs)
            return getattr(other, name)(original, *args, **kwargs)

        return around

    for name in names:
        wrap(owner, name, through(name))


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give the owner's attributes other values inside this context."""
    there = vars(owner)
    before = {name: there[name] for name in values if name in there}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)
