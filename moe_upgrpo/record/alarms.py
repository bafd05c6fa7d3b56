# SPDX-License-Identifier: Apache-2.0
"""Alarms: signs in its metrics that a run is going wrong, each with a value, cause and command.

`Watch` looks at the rows of metrics.jsonl one by one and keeps what it needs of earlier ones: the
last noise floor, the best reward, and how long nothing was learnt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from moe_upgrpo.record.limits import AlarmLimits

Row = dict[str, Any]


class Raised(NamedTuple):
    """An alarm that rings, with the value seen and its limit."""

    name: str
    value: float
    limit: float

    @property
    def short(self) -> str:
        return f"{self.name} ({self.value:.3g}, limit {self.limit:.3g})"


class Watch:
    """A watcher of a run's rows, in order.

    replay: none, R2 or R3, where the source says it.
    """

    def __init__(self, limits: AlarmLimits | None = None, *, replay: str | None = None):
        self.limits = limits or AlarmLimits()
        self.replay = replay
        self.floor: float | None = None
        self.idle = self.unchanged = 0
        size = self.limits.window
        self._rewards: deque[tuple[float, float]] = deque(maxlen=size)
        self._entropies: deque[float] = deque(maxlen=size)
        self.best_reward: float | None = None
        self.first_entropy: float | None = None

    def look(self, row: Row) -> list[Raised]:
        """The alarms that ring at a row; alarms whose metrics it lacks do not."""
        self._remember(row)
        found = []
        for name, alarm in ALARMS.items():
            seen = alarm.fires(row, self)
            if seen is not None:
                found.append(Raised(name, float(seen[0]), float(seen[1])))
        return found

    def add_to(self, row: Row) -> list[Raised]:
        """Look at a row, and write the alarms that ring into it."""
        found = self.look(row)
        row["alarms"] = [one.name for one in found]
        row["alarms/raised"] = float(len(found))
        row |= {f"alarms/{one.name}": one.value for one in found}
        return found

    def catch_up(self, rows: Iterable[Row]) -> None:
        """Take in the rows of a run that is resumed."""
        for row in rows:
            self._remember(row)

    def _remember(self, row: Row) -> None:
        floors = [
            rate
            for name, rate in row.items()
            if name.startswith("noise/") and name.endswith("/router_rate") and _known(row, name)
        ]
        if floors:
            self.floor = max(floors)
        if (signal := _signal(row)) is not None:
            self.idle = 0 if signal else self.idle + 1
        if (changed := row.get("weights/changed_rate")) is not None:
            # Without a gradient there is no update to make.
            stuck = changed == 0 and row.get("grad_norm", 1.0) != 0
            self.unchanged = self.unchanged + 1 if stuck else 0
        if _known(row, "reward/mean"):
            self._rewards.append((row["reward/mean"], _standard_error(row)))
            if (now := self.reward()) is not None:
                best = self.best_reward
                self.best_reward = now[0] if best is None else max(best, now[0])
        name = "entropy/mean" if "entropy/mean" in row else "entropy/sampled"
        if _known(row, name):
            self._entropies.append(row[name])
            if self.first_entropy is None:
                self.first_entropy = self.entropy()

    def reward(self) -> tuple[float, float] | None:
        """Mean over the last steps and its standard error; None until there are enough steps."""
        if len(self._rewards) < self.limits.window:
            return None
        means, errors = zip(*self._rewards, strict=True)
        size = len(means)
        return sum(means) / size, math.sqrt(sum(e**2 for e in errors)) / size

    def entropy(self) -> float | None:
        if len(self._entropies) < self.limits.window:
            return None
        return sum(self._entropies) / len(self._entropies)


def _known(row: Row, name: str) -> bool:
    return isinstance(row.get(name), int | float) and math.isfinite(row[name])


def _signal(row: Row) -> bool | None:
    """Whether a step has anything to learn from; None where the row does not say."""
    said = [row[n] for n in ("advantage/nonzero_rate", "grad_norm") if row.get(n) is not None]
    return all(value != 0 for value in said) if said else None


def _standard_error(row: Row) -> float:
    """Standard error of a step's mean reward, doubled because responses to a prompt are alike."""
    std, sampled = row.get("reward/std"), row.get("tokens/sampled")
    length = row.get("response/length_mean")
    if not (std and sampled and length):
        return 0.0
    return 2 * std / math.sqrt(sampled / length)


def _exceeds(value: float, limit: float) -> bool:
    return not value <= limit  # NaN as well


def _is_stale(row: Row) -> bool:
    """Whether an update lies between the engine's weights and the trainer's."""
    return row.get("staleness/mean", 0) > 0


Seen = tuple[float, float] | None


def _beyond(value: float | None, limit: float) -> Seen:
    return (value, limit) if value is not None and _exceeds(value, limit) else None


def _mismatch(row: Row, watch: Watch) -> Seen:
    limits = watch.limits
    if "mismatch/router_rate" not in row:
        return None
    if _is_stale(row):
        limit = limits.mismatch_stale
    else:
        limit = limits.mismatch
        if watch.floor is not None:
            above = max(limits.mismatch_least, limits.mismatch_times_floor * watch.floor)
            limit = min(limit, above)
    return _beyond(row["mismatch/router_rate"], limit)


def _layer(row: Row, watch: Watch) -> Seen:
    rates = row.get("mismatch/by_layer") or []
    if _is_stale(row) or len(rates) < 2:
        return None
    highest = max(range(len(rates)), key=rates.__getitem__)
    others = [rate for i, rate in enumerate(rates) if i != highest]
    limits = watch.limits
    limit = max(limits.layer_least, limits.layer_times * median(others))
    return _beyond(rates[highest], limit)


def _zero_filled(row: Row, watch: Watch) -> Seen:
    return _beyond(max(row.get("mismatch/zero_rows_by_layer") or [0.0]), watch.limits.zero_rows)


def _repeated(row: Row, watch: Watch) -> Seen:
    if "mismatch/repeated_rows" not in row:
        return None
    more = row["mismatch/repeated_rows"] - row["mismatch/repeated_rows_trainer"]
    if more * row.get("tokens/sampled", math.inf) < _TOKENS_TO_TELL:
        return None
    return _beyond(more, watch.limits.repeated_rows)


_TOKENS_TO_TELL = 20  # with repeated rows; fewer may be chance
_ROUTERS_TO_TELL = 10  # that differ; with other experts, at least one log-prob moves


def _replay_unused(row: Row, watch: Watch) -> Seen:
    effect = row.get("counterfactual/engine_routing/mean_abs")
    if watch.replay != "R3" or effect is None or _is_stale(row):
        return None
    if row.get("mismatch/router_numerator", 0) < _ROUTERS_TO_TELL or effect != 0:
        return None
    return row["mismatch/router_numerator"], 0.0


def _large_gap(row: Row, watch: Watch) -> Seen:
    return None if _is_stale(row) else _beyond(row.get("logp_gap/k3"), watch.limits.log_prob_gap)


def _few_effective_tokens(row: Row, watch: Watch) -> Seen:
    if "loss/ratio_effective_sample_size" not in row:
        return None
    share = row["loss/ratio_effective_sample_size"] / row["tokens/visited"]
    limit = watch.limits.effective_tokens
    return None if share >= limit else (share, limit)  # NaN rings


def _nothing_to_learn(row: Row, watch: Watch) -> Seen:
    limit = watch.limits.steps_without_signal
    return (watch.idle, limit) if watch.idle >= limit and _signal(row) is not None else None


def _unchanged(row: Row, watch: Watch) -> Seen:
    limit = watch.limits.steps_unchanged
    known = "weights/changed_rate" in row
    return (watch.unchanged, limit) if known and watch.unchanged >= limit else None


def _reward_collapse(row: Row, watch: Watch) -> Seen:
    now, best = watch.reward(), watch.best_reward
    if now is None or best is None or not _known(row, "reward/mean"):
        return None
    mean, error = now
    fall = watch.limits.reward_drop * max(abs(best), row.get("reward/std") or 0.0)
    if best - mean <= max(fall, 4 * error):
        return None
    return mean, best - fall


def _entropy_collapse(row: Row, watch: Watch) -> Seen:
    now, first = watch.entropy(), watch.first_entropy
    if now is None or first is None or not ("entropy/mean" in row or "entropy/sampled" in row):
        return None
    limit = watch.limits.entropy_left * first
    return (now, limit) if now < limit else None


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """`fires` gives the value seen and the limit, or None; the texts explain them.

    rings: when it rings, with the defaults of `AlarmLimits`. limits: the fields there that set
    this.
    """

    fires: Callable[[Row, Watch], Seen]
    rings: str
    cause: str
    command: str
    limits: tuple[str, ...]

    @property
    def means(self) -> str:
        return self._means("")

    def _means(self, set_to: str) -> str:
        # A report shows apart what comes after "Next: ".
        return f"{self.rings}{set_to} Likely cause: {self.cause} Next: {self.command}"

    def means_at(self, limits: AlarmLimits) -> str:
        """`means`, with the limits that differ from the defaults."""
        changed = {n: getattr(limits, n) for n in self.limits}
        changed = {n: v for n, v in changed.items() if v != getattr(AlarmLimits(), n)}
        set_to = ", ".join(f"{name} {value:g}" for name, value in changed.items())
        return self._means(f" (Set here: {set_to}.)" if set_to else "")


ALARMS: dict[str, Alarm] = {
    "mismatch-above-noise": Alarm(
        fires=_mismatch,
        rings="more than 30% of routers differ between rollout and trainer, or more than 5% and "
        "ten times what either side last differed from itself (90% where an update lies between "
        "the two).",
        cause="engine and trainer do not compute the same model, their weights are not the same, "
        "or rows are joined to the wrong tokens.",
        command="moe-upgrpo report RUN for the mismatch by layer, then moe-upgrpo probe --model "
        "CHECKPOINT --prompts FILE on the weights of now; --replay R3 keeps it out of the ratio.",
        limits=("mismatch", "mismatch_times_floor", "mismatch_least", "mismatch_stale"),
    ),
    "layer-above-others": Alarm(
        fires=_layer,
        rings="one MoE layer differs in at least 5% of its tokens and five times as often as the "
        "others do in the median.",
        cause="that layer alone is computed otherwise: its routes are recorded at another place, "
        "its weights were not handed over, or its layer number is off by one.",
        command="moe-upgrpo report RUN (routing mismatch by depth names the layer), then "
        "moe-upgrpo probe --model CHECKPOINT --prompts FILE.",
        limits=("layer_times", "layer_least"),
    ),
    "zero-filled-routes": Alarm(
        fires=_zero_filled,
        rings="in some MoE layer the rollout sent over 99% of the tokens to expert 0.",
        cause="with top-1 routing that is how routes look that were never written; replayed, they "
        "would send every token to one expert. (With more than one expert per token a zero-filled "
        "row is an error.)",
        command="moe-upgrpo probe --model CHECKPOINT --prompts FILE, and check that the engine "
        "records that layer.",
        limits=("zero_rows",),
    ),
    "repeated-routes": Alarm(
        fires=_repeated,
        rings="the rollout's rows repeat those of other tokens 20 points more often than the "
        "trainer's own do.",
        cause="the engine hands out stale routes: a buffer that was not written again, or rows of "
        "another request.",
        command="moe-upgrpo doctor for the engine's version, then moe-upgrpo probe --model "
        "CHECKPOINT --prompts FILE; without replay no update uses these rows.",
        limits=("repeated_rows",),
    ),
    "replay-not-used": Alarm(
        fires=_replay_unused,
        rings="under R3, routers differ and no token's log-prob does: the old policy held to the "
        "rollout's routes is to the last bit the one with its own.",
        cause="the routes were given to the trainer and not used: a fused router, a hook that is "
        "not called, or a patch that is missing.",
        command="moe-upgrpo doctor, and moe-upgrpo patch list for what this release needs.",
        limits=(),
    ),
    "large-log-prob-gap": Alarm(
        fires=_large_gap,
        rings="KL(rollout ‖ trainer at the rollout's weights) is above 0.1 per token, a hundred "
        "times what is published for MoE models.",
        cause="stale weights in the engine, another temperature, or rows joined to the wrong "
        "tokens.",
        command="moe-upgrpo probe --model CHECKPOINT --prompts FILE on the weights of now.",
        limits=("log_prob_gap",),
    ),
    "few-effective-tokens": Alarm(
        fires=_few_effective_tokens,
        rings="the importance ratios of the step's optimizer steps leave less than half of the "
        "tokens as effective sample: a few tokens carry the update.",
        cause="too many optimizer steps on a batch, or too high a learning rate.",
        command="the run again with fewer --minibatches or --epochs or a lower --optimizer.lr.",
        limits=("effective_tokens",),
    ),
    "nothing-to-learn": Alarm(
        fires=_nothing_to_learn,
        rings="five steps in a row had no advantage other than 0, or a gradient of 0.",
        cause="every group is all right or all wrong: problems that are too easy or too hard, a "
        "verifier that knows one answer, or an end token that is never sampled.",
        command="moe-upgrpo report RUN for reward and response length, then the run again with "
        "other problems or dynamic sampling.",
        limits=("steps_without_signal",),
    ),
    "weights-unchanged": Alarm(
        fires=_unchanged,
        rings="two steps in a row updated the weights, with a gradient, and none of them changed.",
        cause="a learning rate of 0, parameters that the optimizer does not hold, or updates too "
        "small for the weights' number type.",
        command="moe-upgrpo doctor, then the run again with a higher learning rate or an fp32 "
        "master copy.",
        limits=("steps_unchanged",),
    ),
    "reward-collapse": Alarm(
        fires=_reward_collapse,
        rings="the mean reward of five steps is below half of its best (rewards of either sign: it "
        "fell by half a standard deviation), and by more than chance.",
        cause="updates that are too large: look at the clip fraction, the ratio's tails and the "
        "gap before the fall.",
        command="moe-upgrpo report RUN, then --resume from a checkpoint before the fall or the run "
        "again with a lower learning rate.",
        limits=("reward_drop", "window"),
    ),
    "entropy-collapse": Alarm(
        fires=_entropy_collapse,
        rings="the entropy of five steps is below a tenth of that of the first.",
        cause="the policy has become deterministic and has little left to explore with.",
        command="moe-upgrpo report RUN, then the run again with a lower learning rate, a higher "
        "upper clip or a loss that holds entropy up (docs/losses.md).",
        limits=("entropy_left", "window"),
    ),
}


def texts(limits: AlarmLimits) -> dict[str, str]:
    """Every alarm's meaning, for a run's config."""
    return {name: alarm.means_at(limits) for name, alarm in ALARMS.items()}
