"""The table of every option of `moe-upgrpo train`, from the config's own fields and their texts.

docs/make_tables.py puts it into docs/options.md.
"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.policy_options import PRESET, PolicyOptions, field_texts

_KINDS = {bool: "yes or no", int: "integer", float: "number", str: "text", Path: "path"}
_PAGE = re.compile(r"docs/([a-z-]+)\.md")


def markdown() -> str:
    """A heading and a table for each part of the config."""
    text = []
    for part, cls in get_type_hints(TrainConfig).items():
        rows = [*_rows(cls)]
        if not rows:
            raise ValueError(f"TrainConfig.{part} has no options")
        title = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
        text += [f"### {title}", "", "| option | values | default | meaning |"]
        text += ["| --- | --- | --- | --- |"]
        text += ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in rows]
        text.append("")
    return "\n".join(text).rstrip("\n")


def _rows(cls: type, prefix: str = "") -> Iterator[list[str]]:
    """Option, values, default and meaning of each field; a group's own options in its place."""
    declared = PolicyLossConfig if cls is PolicyOptions else cls
    hints, texts = get_type_hints(declared), field_texts(declared)
    for one in fields(cls):
        hint = hints[one.name]
        if is_dataclass(hint):
            yield from _rows(hint, f"{prefix}{one.name}.")
            continue
        name = f"`--{prefix}{one.name}`".replace("_", "-")
        if one.name not in texts:
            raise ValueError(f"{cls.__name__}.{one.name} has no text below it: write one")
        yield [name, _values(hint), _default(one), _PAGE.sub(r"[\1](\1.md)", texts[one.name])]


def _values(hint: Any) -> str:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return ", ".join(_kind(kind) for kind in kinds if kind is not NoneType)


def _kind(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        return _values(inside[0]) + (
            ", several" if inside[-1] is ... else f", {len(inside)} of them"
        )
    if origin is dict:
        return "NAME VALUE"
    return _KINDS[hint]


def _default(one: Field) -> str:
    value = one.default_factory() if one.default is MISSING else one.default
    if value == PRESET:
        return "the preset's"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return (
        f"{value:g}" if isinstance(value, float) else str(value) if value or value == 0 else "none"
    )
