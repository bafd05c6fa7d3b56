# SPDX-License-Identifier: Apache-2.0
"""A preset together with the changes that a stack's flags and settings make to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_upgrpo import plugins
from moe_upgrpo.errors import UserError, nearest
from moe_upgrpo.losses import BRANCHES, PRESETS, PolicyLossConfig, RolloutCorrection

# Why no stack hands a loss these: each calls it with a micro-batch, cut by length and rank.
WHY_NOT = {
    "groups": "the responses to a prompt lie in several micro-batches and on several ranks",
    "token_weights": "they compare the responses to a prompt, which lie in several micro-batches",
    "statistics": "they are of the whole mini-batch, and the loss sees one micro-batch",
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A stack's own flag that sets a field of the loss.

    A stack's config always holds a value, so a value other than the default is taken as set by the
    user; otherwise the preset's value holds.
    """

    name: str
    value: Any
    default: Any
    field: str


def served(not_handed_over: Iterable[str]) -> dict[str, PolicyLossConfig]:
    """The presets, including those of plug-ins, that need none of the arguments of `policy_loss`
    that a stack lacks."""
    plugins.load()
    return {n: p for n, p in PRESETS.items() if not p.arguments & set(not_handed_over)}


def resolve(
    preset: str | None,
    settings: Mapping[str, Any] | None,
    flags: Iterable[Flag] = (),
    *,
    option: str,
    settings_option: str,
    stack: str,
    not_handed_over: Iterable[str],
    settings_win: bool = True,
    label: str | None = None,
) -> PolicyLossConfig:
    """The preset, changed by the flags, then by the settings.

    option, settings_option: the user's names for the two. not_handed_over: arguments of
    `policy_loss` that the stack cannot give. settings_win: if the settings name a field, its flag
    is ignored, whatever it says. label: the loss's name in messages; None: the preset.

    Raises UserError: no such preset or field, settings that are not possible, a flag for a field
    that the loss does not have, a loss that needs what the stack does not hand over.
    """
    allowed = served(not_handed_over)
    if preset not in allowed:
        reason = ""
        if preset in PRESETS:
            lacking = sorted(PRESETS[preset].arguments & set(not_handed_over))
            reason = (
                f", a loss that needs {', '.join(lacking)}, which {stack} does not hand to one"
                f"{_why(lacking)}"
            )
        near = nearest(str(preset), allowed)
        raise UserError(f"{option}: {preset!r} given{reason}; allowed: {', '.join(allowed)}{near}")
    config, label = allowed[preset], label or preset
    config = with_settings(config, settings, settings_option, stack, not_handed_over)
    sides = {config.positive, config.negative}
    used = {field for side in sides for field in BRANCHES[side].fields}
    changes = {}
    for flag in flags:
        if flag.value == flag.default or (settings_win and flag.field in (settings or {})):
            continue
        if flag.field not in used:
            raise UserError(
                f"{flag.name}: {flag.value} given; {label} has no {flag.field}. Leave it at "
                f"{stack}'s {flag.default}; the fields of this loss, in {settings_option}: "
                f"{', '.join(sorted(used)) or 'none'}"
            )
        if flag.field not in (settings or {}):
            changes[flag.field] = flag.value
    return replace(config, **changes)


def with_settings(
    config: PolicyLossConfig,
    settings: Mapping[str, Any] | None,
    option: str,
    stack: str,
    not_handed_over: Iterable[str],
) -> PolicyLossConfig:
    """A config with some fields changed. Raises UserError that names the option."""
    settings = {} if settings is None else settings
    fields = vars(config)
    if not isinstance(settings, Mapping) or settings.keys() - fields.keys():
        raise UserError(f"{option}: {settings!r} given; allowed: fields of {', '.join(fields)}")
    changes = dict(settings)
    if isinstance(correction := changes.get("correction"), Mapping):
        known = [field.name for field in dataclasses.fields(RolloutCorrection)]
        if unknown := correction.keys() - set(known):
            raise UserError(
                f"{option}: correction with {', '.join(sorted(unknown))} given; allowed: "
                f"{', '.join(known)}"
            )
        changes["correction"] = RolloutCorrection(**correction)
    config = replace(config, **changes)
    if lacking := sorted(config.arguments & set(not_handed_over)):
        raise UserError(
            f"{option}: {settings!r} given; this loss needs {', '.join(lacking)}, which {stack} "
            f"does not hand to a loss{_why(lacking)}"
        )
    return config


def _why(lacking: Iterable[str]) -> str:
    reasons = "; ".join(f"{name}: {WHY_NOT[name]}" for name in lacking if name in WHY_NOT)
    return f" ({reasons}; `moe-upgrpo train` has them)" if reasons else ""


def coupled(config: PolicyLossConfig) -> list[str]:
    """Branches of the loss that weigh whole sequences."""
    return [side for side in (config.positive, config.negative) if BRANCHES[side].coupled]
