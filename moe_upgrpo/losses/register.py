# SPDX-License-Identifier: Apache-2.0
"""Register your own losses beside those of `BRANCHES`, as data of the same kind."""

import re
from dataclasses import fields, replace
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses.aggregation import AGGREGATIONS
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.config import FACTORS, PRESETS, PolicyLossConfig
from moe_upgrpo.losses.side import Branch, Side
from moe_upgrpo.losses.tokens import CONTEXT

# A branch does not name `statistics` as an argument: it gets those that its own field computes.
ARGUMENTS = ("rollout_log_probs", *(name for name in CONTEXT if name != "statistics"))


def register_loss(name: str, branch: Branch, **numbers: Any) -> None:
    """Make presets of a branch: NAME, for both signs, and up-NAME, with UP's positive side.

    There is no up-NAME where `branch.up` is False. As `positive` or `negative` of a config, it
    combines with every branch that shares its aggregation. numbers: fields of `PolicyLossConfig` in
    which the presets differ from its defaults. The same branch may be registered again.

    Raises:
        UserError: a name that is taken or not a word; a branch that is not a `Branch`, has no
            aggregation, names an unknown field, argument, factor or aggregation, or has half of an
            extra term; invalid numbers.
    """
    if BRANCHES.get(name) is branch:
        return
    taken = {*BRANCHES, *PRESETS} & {name, f"up-{name}"}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or taken:
        raise UserError(
            f"register_loss: {name!r} given; allowed: small letters, digits, - and ., and no name "
            f"that is taken ({', '.join(sorted(taken)) or 'this is none'})"
        )
    _check(name, branch)
    BRANCHES[name] = branch
    try:
        whole = PolicyLossConfig(
            positive=name,
            negative=name,
            **{"aggregation": branch.aggregations[0], **numbers},
        )
        presets = {name: whole}
        if branch.up:
            presets[f"up-{name}"] = replace(whole, positive="log-likelihood")
    except (UserError, TypeError) as error:
        del BRANCHES[name]
        raise UserError(f"register_loss({name!r}): {error}") from None
    PRESETS.update(presets)


def _check(name: str, branch: Branch) -> None:
    """Raise UserError for a branch that no loss could be made from."""
    if not isinstance(branch, Branch):
        raise UserError(f"register_loss({name!r}): {branch!r} given; allowed: a Branch")
    known = {
        "aggregations": tuple(AGGREGATIONS),
        "fields": tuple(field.name for field in fields(PolicyLossConfig)),
        "arguments": ARGUMENTS,
        "refuses": FACTORS,
    }
    for kind, allowed in known.items():
        given = getattr(branch, kind)
        if {*given} - {*allowed} or (kind == "aggregations" and not given):
            raise UserError(
                f"register_loss({name!r}): {kind} {given!r} given; allowed: {', '.join(allowed)}"
            )
    for sign in ("positive", "negative", *(["both"] if branch.both is not None else [])):
        side = getattr(branch, sign)
        if not isinstance(side, Side):
            raise UserError(f"register_loss({name!r}): {sign} {side!r} given; allowed: a Side")
        if (side.extra is None) != (side.extra_slope is None):
            raise UserError(
                f"register_loss({name!r}): {sign} with extra {side.extra!r} and extra_slope "
                f"{side.extra_slope!r} given; allowed: both, or none"
            )
