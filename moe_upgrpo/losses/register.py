"""Losses of one's own beside those of `BRANCHES`, as data of the same kind."""

import re
from dataclasses import fields, replace

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses.aggregation import AGGREGATIONS
from moe_upgrpo.losses.branches import BRANCHES, Branch
from moe_upgrpo.losses.config import PRESETS, PolicyLossConfig

ARGUMENTS = ("rollout_log_probs", "router_log_probs")


def register_loss(name: str, branch: Branch, **numbers) -> None:
    """Make a branch a loss: the presets NAME, for both signs, and up-NAME, with UP's positive side.

    As `positive` or `negative` of a config it goes with every other branch that has its
    aggregation. numbers: fields of `PolicyLossConfig` in which the presets differ from its
    defaults. The same branch may be registered again.

    Raises:
        UserError: a name that is taken or no word; a branch that is none, without an aggregation,
            or with a field, an argument or an aggregation that there is not; numbers that cannot
            be.
    """
    if BRANCHES.get(name) is branch:
        return
    taken = {*BRANCHES, *PRESETS} & {name, f"up-{name}"}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or taken:
        raise UserError(
            f"register_loss: {name!r} given; allowed: small letters, digits, - and ., and no name "
            f"that is taken ({', '.join(sorted(taken)) or 'this is none'})"
        )
    if not isinstance(branch, Branch):
        raise UserError(f"register_loss({name!r}): {branch!r} given; allowed: a Branch")
    known = {
        "aggregations": tuple(AGGREGATIONS),
        "fields": tuple(field.name for field in fields(PolicyLossConfig)),
        "arguments": ARGUMENTS,
    }
    for kind, allowed in known.items():
        given = getattr(branch, kind)
        if {*given} - {*allowed} or (kind == "aggregations" and not given):
            raise UserError(
                f"register_loss({name!r}): {kind} {given!r} given; allowed: {', '.join(allowed)}"
            )
    BRANCHES[name] = branch
    try:
        whole = PolicyLossConfig(
            positive=name,
            negative=name,
            **{"aggregation": branch.aggregations[0], **numbers},
        )
    except (UserError, TypeError) as error:
        del BRANCHES[name]
        raise UserError(f"register_loss({name!r}): {error}") from None
    PRESETS[name] = whole
    PRESETS[f"up-{name}"] = replace(whole, positive="log-likelihood")
