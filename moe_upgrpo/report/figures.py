"""The report's figures: which metrics each shows, how to read it, and what a run says in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_upgrpo.report.runs import Run

Format = Callable[[float], str]


def percent(value: float) -> str:
    return f"{100 * value:.3g}%" if abs(value) < 0.9995 else f"{100 * value:.4g}%"


def number(value: float) -> str:
    return f"{value:.3g}"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Metrics over steps. ``metrics`` gives (name, label) for a run: pass@K differs by run.

    ``floor`` are metrics of the noise floor: marks at the analysed steps, a line at their mean.
    """

    key: str
    title: str
    metrics: Callable[[Run], list[tuple[str, str]]]
    read: str
    says: Callable[[Run], str]
    is_share: bool = False
    log_scale: bool = False
    points_only: bool = False
    from_zero: bool = False
    floor: tuple[tuple[str, str], ...] = ()

    def data(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """One entry for each run and metric that has values."""
        entries = []
        for run in runs:
            metrics = [(name, label, False) for name, label in self.metrics(run)]
            for name, label, is_floor in [*metrics, *((*pair, True) for pair in self.floor)]:
                steps, values = run.series(name)
                if values:
                    entry = {"run": run.label, "metric": name, "label": label, "floor": is_floor}
                    entries.append(entry | {"steps": steps, "values": values})
        return entries


@dataclass(frozen=True, kw_only=True)
class LayerFigure:
    """Mismatch by layer: as a heat map layer × step for each run, or pooled over the steps."""

    key: str
    title: str
    read: str
    says: Callable[[Run], str]
    over_steps: bool

    def data(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        entries = []
        for run in runs:
            found = run.by_layer()
            if found is None:
                continue
            steps, rates = found
            entry = {"run": run.label, "layer_ids": run.layer_ids(rates.shape[1])}
            if self.over_steps:
                nullable = np.where(np.isnan(rates), None, rates.astype(object))
                entry |= {"steps": steps, "rates": nullable.tolist()}
            else:
                entry |= {"rates": run.pooled_by_layer().tolist()}
            entries.append(entry)
        return entries


def _only(*metrics: tuple[str, str]) -> Callable[[Run], list[tuple[str, str]]]:
    return lambda run: list(metrics)


def trend(run: Run, name: str, what: str, form: Format = number) -> str:
    """Beginning against end of a run, and whether the difference stands out of the step noise.

    The noise of one step is taken as the standard deviation of the differences of consecutive
    values over √2; a change counts when it exceeds twice that of two means of n steps.
    """
    steps, values = run.series(name)
    if not values:
        return f"{name} was not logged."
    if len(values) == 1:
        return f"{what} is {form(values[0])} at step {steps[0]}, the only one logged."
    first, last, n = run.ends(name)
    span = f"{n} steps" if n > 1 else "step logged"
    noise = np.std(np.diff(values)) / np.sqrt(2)
    if len(values) == 2:
        verb = "goes"
    elif abs(last - first) > 2 * noise * np.sqrt(2 / n):
        verb = "rises" if last > first else "falls"
    else:
        return (
            f"{what} is {form(first)} in the first and {form(last)} in the last {span}: "
            "no change beyond the noise from step to step."
        )
    return (
        f"{what} {verb} from {form(first)} to {form(last)} between the first and the last {span}."
    )


def _says_trend(name: str, what: str, form: Format = number) -> Callable[[Run], str]:
    return lambda run: trend(run, name, what, form)


def accuracy(run: Run, name: str) -> str | None:
    """'31% → 52%' of a held-out accuracy, or its one value; None where it was not evaluated."""
    _, values = run.series(name)
    if not values:
        return None
    return percent(values[0]) + (f" → {percent(values[-1])}" if len(values) > 1 else "")


def _says_accuracy(run: Run) -> str:
    steps, greedy = run.series("eval/greedy")
    if not greedy:
        return "no held-out evaluation was logged."
    _, problems = run.series("eval/problems")
    if len(greedy) == 1:
        text = f"greedy accuracy is {percent(greedy[0])} at step {steps[0]}"
    else:
        text = (
            f"greedy accuracy goes from {percent(greedy[0])} at step {steps[0]} to "
            f"{percent(greedy[-1])} at step {steps[-1]}"
        )
    if problems:
        error = max(np.sqrt(p * (1 - p) / problems[-1]) for p in (greedy[0], greedy[-1]))
        text += f", on {problems[-1]:.0f} problems (standard error up to {percent(error)})"
    return text + "."


def _says_clip(run: Run) -> str:
    means = {}
    for sign in ("positive", "negative"):
        _, values = run.series(f"clip/{sign}")
        if not values:
            return "clip fractions were not logged."
        means[sign] = float(np.mean(values))
    return (
        f"on average the loss's rule takes the gradient from {percent(means['positive'])} of the "
        f"tokens with positive and {percent(means['negative'])} of those with negative advantage."
    )


def _floors(metric: str) -> tuple[tuple[str, str], ...]:
    return (
        (f"noise/repeat/{metric}", "floor: same forward twice"),
        (f"noise/batch_shape/{metric}", "floor: other batch shape"),
    )


def _says_floor(run: Run, metric: str, measured: str, form: Format) -> str:
    """The trainer's own noise floor, and how far ``measured`` is above it on the same steps."""
    floors = []
    for name, _ in _floors(metric):
        steps, values = run.series(name)
        if not values:
            return "no noise floor was measured"
        floors.append(float(np.mean(values)))
    text = (
        f"the trainer's own noise floor, at {len(steps)} analysed step{'s' * (len(steps) > 1)}, is "
        f"{form(floors[0])} between identical forwards and {form(floors[1])} in another batch shape"
    )
    found = dict(zip(*run.series(measured), strict=True))
    there = [found[step] for step in steps if step in found]
    if not there:
        return text
    mean = float(np.mean(there))
    text += f", against {form(mean)} from engine to trainer on those steps"
    if mean and max(floors):
        return text + f": {number(mean / max(floors))} times the larger floor"
    return text + (": all of it above the floor" if mean else "")


def _says_routing(run: Run) -> str:
    router, any_layer = run.pooled("mismatch/router_rate"), run.pooled("mismatch/token_any_rate")
    if router is None:
        return "no routes were compared."
    compared = sum(row.get("mismatch/router_denominator") or 0 for row in run.rows)
    of = f" of {compared:,.0f} (token, layer) pairs" if compared else " of (token, layer) pairs"
    text = f"{percent(router)}{of} differ over the whole run"
    if any_layer is not None:
        text += f"; {percent(any_layer)} of tokens differ in at least one layer"
        by_layer = run.pooled_by_layer()
        if by_layer is not None and router > 0:
            independent = 1 - np.prod(1 - by_layer)
            text += f" ({percent(independent)} if layers flipped independently)"
    floor = _says_floor(run, "router_rate", "mismatch/router_rate", percent)
    return f"{text}. {sentence(floor)}."


def _says_layers(run: Run) -> str:
    rates = run.pooled_by_layer()
    if rates is None:
        return "no MoE layer was compared."
    ids = run.layer_ids(len(rates))
    if not rates.any():
        return f"no mismatch in any of the {len(rates)} MoE layers."
    top, low = int(rates.argmax()), int(rates.argmin())
    return (
        f"over the whole run layer {ids[top]} differs most ({percent(rates[top])}) and layer "
        f"{ids[low]} least ({percent(rates[low])})."
    )


def _says_depth(run: Run) -> str:
    rates = run.pooled_by_layer()
    if rates is None:
        return "no MoE layer was compared."
    if len(rates) == 1:
        return f"its one MoE layer differs for {percent(rates[0])} of tokens."
    half = len(rates) // 2
    first, second = float(rates[:half].mean()), float(rates[-half:].mean())
    return (
        f"the mean rate is {percent(first)} in the lower half of the MoE layers and "
        f"{percent(second)} in the upper half."
    )


def _says_gap(run: Run) -> str:
    _, mean_abs = run.series("logp_gap/mean_abs")
    _, largest = run.series("logp_gap/max_abs")
    _, k3 = run.series("logp_gap/k3")
    if not mean_abs:
        return "no log-prob gap was logged."
    text = f"|gap| is {number(np.mean(mean_abs))} nats in the mean over steps"
    if k3:
        text += f", its KL estimate {number(np.mean(k3))}"
    if largest:
        worst = max(largest)
        text += f"; the largest of any token is {number(worst)}, a ratio of {number(np.exp(worst))}"
    floor = _says_floor(run, "logp_mean_abs", "logp_gap/mean_abs", number)
    return f"{text}. {sentence(floor)}."


_TERMS = {
    "numerics": "numerics",
    "engine_routing": "engine routing",
    "update": "update",
    "routing_shift": "routing shift",
}


def _says_decomposition(run: Run) -> str:
    means = {}
    for term, name in _TERMS.items():
        steps, values = run.series(f"gap/{term}/mean_abs")
        if not values:
            return "the gap was not taken apart: analysed steps of a run without replay do that."
        means[name] = float(np.mean(values))
    (top, largest), *others = sorted(means.items(), key=lambda item: -item[1])
    at = f"{len(steps)} analysed step{'s' * (len(steps) > 1)}"
    if not largest:
        return f"all four terms are 0 at {at}."
    rest = ", ".join(f"{name} {number(value)}" for name, value in others)
    return f"{top} is the largest term: {number(largest)} nats in the mean over {at}; {rest}."


def _evaluations(run: Run) -> list[tuple[str, str]]:
    passes = [(name, name.removeprefix("eval/")) for name in run.pass_at_k()]
    return [("eval/greedy", "greedy"), *passes]


FIGURES: list[Curves | LayerFigure] = [
    Curves(
        key="reward",
        title="Reward",
        metrics=_only(("reward/mean", "mean reward")),
        read="Mean reward of the responses sampled in each step, on training problems; "
        "upward is learning.",
        says=_says_trend("reward/mean", "mean reward"),
    ),
    Curves(
        key="held_out",
        title="Held-out accuracy",
        metrics=_evaluations,
        read="Share of held-out problems solved: greedily, and by one (pass@1) or one of K "
        "(pass@K) sampled answers. Step 0 is the warm start.",
        says=_says_accuracy,
        is_share=True,
        points_only=True,
        from_zero=True,
    ),
    Curves(
        key="routing",
        title="Routing mismatch",
        metrics=_only(
            ("mismatch/token_any_rate", "tokens, any layer"),
            ("mismatch/router_rate", "routers"),
            ("mismatch/slot_rate", "expert slots"),
        ),
        read="Share of tokens, of (token, layer) pairs and of expert slots in which engine and "
        "trainer, each routing freely at equal weights, chose differently; 0 is agreement. Hollow "
        "marks are the trainer against itself, per (token, layer) pair: what lies no higher than "
        "they do says nothing about the engine.",
        says=_says_routing,
        is_share=True,
        from_zero=True,
        floor=_floors("router_rate"),
    ),
    LayerFigure(
        key="layers",
        title="Routing mismatch by layer and step",
        read="Each cell is the share of a step's tokens whose expert set differs in that MoE "
        "layer; a bright row is a layer, a bright column a step.",
        says=_says_layers,
        over_steps=True,
    ),
    LayerFigure(
        key="depth",
        title="Routing mismatch by depth",
        read="The same shares pooled over all steps; a slope to the right means that "
        "differences pile up with depth.",
        says=_says_depth,
        over_steps=False,
    ),
    Curves(
        key="logp_gap",
        title="Log-prob gap",
        metrics=_only(
            ("logp_gap/max_abs", "max |gap|"),
            ("logp_gap/mean_abs", "mean |gap|"),
            ("logp_gap/k3", "KL (k3)"),
        ),
        read="Gap = log p of the trainer at the engine's weights − log p of the engine, per "
        "sampled token; exp(gap) is an importance ratio that is off 1 before any update. Hollow "
        "marks are the mean |gap| of the trainer against itself.",
        says=_says_gap,
        log_scale=True,
        floor=_floors("logp_mean_abs"),
    ),
    Curves(
        key="decomposition",
        title="The log-prob gap taken apart",
        metrics=_only(*((f"gap/{term}/mean_abs", name) for term, name in _TERMS.items())),
        read="Mean |term| per token at the analysed steps. The four terms, signs kept, add up to "
        "log p of the trainer after its update − log p of the engine: arithmetic at the engine's "
        "experts, then the trainer's own experts, then the new weights at those experts, then the "
        "experts that the new weights choose. Their magnitudes do not add up, and in another order "
        "each would come out somewhat different.",
        says=_says_decomposition,
        log_scale=True,
        points_only=True,
        from_zero=True,
    ),
    Curves(
        key="clip",
        title="Clip fraction by sign of the advantage",
        metrics=_only(
            ("clip/positive", "advantage > 0"),
            ("clip/negative", "advantage < 0"),
        ),
        read="Share of tokens of that sign whose gradient the loss's own rule took away; a "
        "branch without a ratio never clips.",
        says=_says_clip,
        is_share=True,
        from_zero=True,
    ),
    Curves(
        key="kl",
        title="KL to the warm start",
        metrics=_only(("kl/warm_start", "KL (k3)")),
        read="Distance travelled from the warm start, estimated on the sampled tokens, in nats "
        "per token.",
        says=_says_trend("kl/warm_start", "KL per token"),
        from_zero=True,
    ),
    Curves(
        key="entropy",
        title="Entropy",
        metrics=_only(("entropy/mean", "entropy")),
        read="Mean entropy of the next-token distribution, in nats; a fall to 0 means that "
        "sampling no longer explores.",
        says=_says_trend("entropy/mean", "entropy"),
        from_zero=True,
    ),
    Curves(
        key="length",
        title="Response length",
        metrics=_only(("response/length_mean", "tokens")),
        read="Mean length of the sampled responses in tokens; a jump often comes before a "
        "collapse, or from responses that no longer end.",
        says=_says_trend("response/length_mean", "mean length"),
        from_zero=True,
    ),
    Curves(
        key="grad_norm",
        title="Gradient norm",
        metrics=_only(("grad_norm", "gradient norm")),
        read="Global norm before clipping, mean over the step's optimizer steps; spikes mark "
        "batches that moved the weights far.",
        says=_says_trend("grad_norm", "the gradient norm"),
        from_zero=True,
    ),
]
