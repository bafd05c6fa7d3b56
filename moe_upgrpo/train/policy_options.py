# SPDX-License-Identifier: Apache-2.0
"""`--policy.NAME VALUE`: every field of `PolicyLossConfig` as an option over the preset's value.

The options are made from the config's own fields: a field that a loss adds there is an option.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import Field, asdict, field, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import ADVANTAGES, BRANCHES, PRESETS, PolicyLossConfig, RolloutCorrection
from moe_upgrpo.losses.names import check_name

PRESET = "preset"
"""The value of an option that is left to the preset. None is a value: no bound, or off."""
_NO_LOSSES = {
    "fixed-old-policy": "give --loss reinforce --gradient-at old (docs/options.md)",
}
_METAVARS = {str: "NAME", float: "FLOAT", int: "INT", bool: "{true,false}"}
_NONE = ("none", "null")

_shown_loss: ContextVar[str | None] = ContextVar("shown_loss", default=None)


@contextmanager
def help_for(loss: str) -> Iterator[None]:
    """Inside, `--help` shows the options' values under that preset."""
    token = _shown_loss.set(loss)
    try:
        yield
    finally:
        _shown_loss.reset(token)


def _reader(hint: Any) -> PrimitiveConstructorSpec | None:
    """Make a reader of one word as a value of a simple kind, None included."""
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if len(kinds - {NoneType}) > 1 or not kinds - {NoneType} <= _METAVARS.keys():
        return None
    (kind,) = kinds - {NoneType}
    metavar = _METAVARS[kind] + ("|none" if NoneType in kinds else "")

    def read(words: list[str]) -> Any:
        (word,) = words
        if word == PRESET:
            return PRESET
        if word.lower() in _NONE and NoneType in kinds:
            return None
        try:
            return {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
        except (KeyError, ValueError):
            raise UserError(f"{word!r} given; allowed: {metavar}, or {PRESET}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _option(one: Field, hint: Any, doc: str) -> tuple[str, Any, Any]:
    """The option of a field of the loss, as `make_dataclass` takes it."""

    def default(_: str) -> str:
        preset = PRESETS.get(_shown_loss.get())
        if preset is None:
            return "(default: the preset's)"
        value = getattr(preset, one.name)
        return f"(default: the preset's, {'none' if value is None else value})"

    shown, reader = arg(help=doc, help_behavior_hint=default), _reader(hint)
    # Words for other kinds, such as pairs of numbers, are read by tyro.
    kind = Annotated[Any, reader] if reader else hint | Literal[PRESET]
    return one.name, Annotated[kind, shown], field(default=PRESET)


def field_texts(cls: type) -> dict[str, str]:
    """The text below each field in the source of a class."""
    (found,) = ast.parse(inspect.getsource(cls)).body
    return {
        declared.target.id: " ".join(text.value.value.split())
        for declared, text in pairwise(found.body)
        if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _options(cls: type) -> type:
    """A class of options, one for each field of `cls` except those that are groups themselves."""
    hints, docs = get_type_hints(cls), field_texts(cls)
    own = (one for one in fields(cls) if not is_dataclass(hints[one.name]))
    return make_dataclass(
        "PolicyOptions",
        [_option(one, hints[one.name], docs[one.name]) for one in own],
        frozen=True,
        kw_only=True,
        namespace={
            "__doc__": "Choices and numbers of the policy loss over those of its preset.",
            "__module__": __name__,
        },
    )


PolicyOptions = _options(PolicyLossConfig)


def asked(options: PolicyOptions) -> dict[str, Any]:
    """The options that were set, not left to the preset."""
    return {name: value for name, value in asdict(options).items() if value != PRESET}


def resolved(loss: str, options: PolicyOptions, correction: RolloutCorrection) -> PolicyLossConfig:
    """The preset `loss` with the options that were set.

    Raises UserError that names the option: an unknown name, an impossible value, or an option that
    this loss would not read.
    """
    if loss in _NO_LOSSES:
        raise UserError(f"loss: {loss!r} given, which is no loss of its own: {_NO_LOSSES[loss]}")
    check_name("loss", loss, PRESETS)
    changes = asked(options)
    try:
        config = replace(
            PRESETS[loss],
            **changes,
            **({"correction": correction} if correction.active else {}),
        )
    except UserError as error:
        named = str(error).partition(":")[0]
        prefix = "policy." if hasattr(options, named) else ""
        raise UserError(f"{prefix}{error}") from None
    _check_read(loss, config, changes)
    return config


def _takes_tokens(loss: PolicyLossConfig) -> bool:
    """Whether the tokens of a response may have advantages of their own under this loss."""
    coupled = any(BRANCHES[name].coupled for name in (loss.positive, loss.negative))
    return not coupled and "token_weights" not in loss.arguments


def check_token_advantages(
    advantage: str, beta: float | None, eta: float | None, loss: PolicyLossConfig, words: str
) -> None:
    """Raise UserError where advantages of tokens cannot be, or do not fit the loss or one another.

    beta, eta: of NTHR's mask. words: what the loss is called.
    """
    if beta is None and eta is not None:
        raise UserError(f"nthr_eta={eta} without nthr_beta: there is no mask. Give both.")
    if beta is not None and not 0 <= beta < math.inf:
        raise UserError(f"nthr_beta={beta}: 0 or more is needed; the paper has 1.")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"nthr_eta={eta}: from 0 to 1 is needed.")
    of_tokens = ADVANTAGES[advantage].of_tokens is not None
    if of_tokens and beta is not None:
        raise UserError(
            f"nthr_beta={beta} with advantage={advantage!r}: NTHR tells right responses from wrong "
            "ones by the sign of their one advantage. Leave one out."
        )
    if (of_tokens or beta is not None) and not _takes_tokens(loss):
        option = f"advantage={advantage!r}" if of_tokens else f"nthr_beta={beta}"
        able = [name for name, preset in PRESETS.items() if _takes_tokens(preset)]
        raise UserError(
            f"{option} with loss={words!r}: each token gets an advantage of its own, and this loss "
            f"takes one for a whole response. It goes with {', '.join(able)}."
        )


def _check_read(loss: str, config: PolicyLossConfig, changes: dict[str, Any]) -> None:
    """Raise UserError for an option that the loss would ignore."""
    read = {*BRANCHES[config.positive].fields, *BRANCHES[config.negative].fields}
    if config.aggregation == "seq-mean-token-sum-norm":
        read.add("token_sum_norm")
    of_some = {"token_sum_norm", *(name for branch in BRANCHES.values() for name in branch.fields)}
    for name, value in changes.items():
        if name in of_some - read:
            raise UserError(
                f"policy.{name}: {value} given; loss {loss!r} with positive {config.positive!r}, "
                f"negative {config.negative!r} and aggregation {config.aggregation!r} does not "
                f"read it. It reads {', '.join(sorted(read)) or 'no number'}"
            )
