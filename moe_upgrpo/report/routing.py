# SPDX-License-Identifier: Apache-2.0
"""Routing of engine and trainer, its effect on log-probs, and the noise floors of both."""

from collections.abc import Sequence

import numpy as np

from moe_upgrpo.report.figures import (
    FLOORS,
    ByLayer,
    Curves,
    Entry,
    Format,
    HeatMap,
    Histogram,
    Panels,
    no_routes,
    number,
    only,
    percent,
    plural,
    sentence,
)
from moe_upgrpo.report.floors import against_floor, counts, told
from moe_upgrpo.report.runs import Run
from moe_upgrpo.report.tails import TAILS

_PASSES = {
    "trainer": {"repeat": "the same forward twice", "batch_shape": "another batch shape"},
    "engine": {
        "repeat": "the same pass twice",
        "batch_shape": "sampling against one pass over the whole sequence",
    },
}


def _says_floor(
    run: Run, metric: str, measured: str, form: Format, sides: Sequence[str] = tuple(_PASSES)
) -> str:
    """Each side's own noise floor, and how far ``measured`` is above it on the same steps.

    Steps with stale samples are left out where others were analysed: there, an update is part of
    the difference.
    """
    names = [f"noise/{side}_{kind}" for side in sides for kind in _PASSES[side]]
    analysed = sorted({step for name in names for step in run.series(f"{name}/{metric}")[0]})
    if not analysed:
        return "no noise floor was measured"
    stale_steps = set(run.stale_steps)
    fresh = [step for step in analysed if step not in stale_steps]
    steps = fresh or analysed
    texts, floors = [], {}
    for side in sides:
        found = []
        for kind, what in _PASSES[side].items():
            name = f"noise/{side}_{kind}"
            value = run.pooled(f"{name}/{metric}", steps=steps)
            if value is not None:
                floors[name] = value
                found.append(f"{_counted(run, name, value, steps, metric, form)} ({what})")
        texts.append(
            f"the {side} differs from itself by {' and '.join(found)}"
            if found
            else f"the {side}'s own was not measured"
        )
    at = plural(len(steps), "analysed step") + " of fresh samples" * bool(fresh != analysed)
    text = f"noise floor at {at}: {'; '.join(texts)}"
    mean = run.pooled(measured, steps=steps)
    if mean is None:
        return text
    shown = _counted(run, "mismatch", mean, steps, metric, form)
    text += f"; engine and trainer on those steps by {shown}"
    if not fresh:
        return text + ", with an update between them"
    largest = max(floors, key=floors.get)
    if metric != "router_rate":
        times = floors[largest] and mean / floors[largest]
        return text + (f", {number(times)} times the largest floor" if times else "")
    known = all(counts(run, name, steps) for name in ("mismatch", largest))
    return text + (told(against_floor(run)) if mean and known else "")


def _counted(
    run: Run, name: str, rate: float, steps: Sequence[int], metric: str, form: Format
) -> str:
    """'0.2%, 1 of 496': a rate and, for routers, its counts where they were logged."""
    found = counts(run, name, steps) if metric == "router_rate" else None
    return form(rate) + (f", {found[0]:,} of {found[1]:,}" if found else "")


def stale(run: Run) -> str:
    """Say how many steps compare the trainer with an engine on older weights, if any."""
    if not (steps := run.stale_steps):
        return ""
    found = run.series("staleness/mean")
    ages = sorted({value for value in found[1] if value})
    age = number(ages[0]) if len(ages) == 1 else f"{number(ages[0])} to {number(ages[-1])}"
    return (
        f"at {len(steps)} of {plural(len(found[0]), 'step')} the samples are of older weights than "
        f"the trainer's (staleness/mean {age}): an update lies between the two, and is in what "
        "differs."
    )


def _with_stale(run: Run, text: str) -> str:
    return f"{text} {sentence(stale(run))}" if run.stale_steps else text


def _says_routing(run: Run) -> str:
    router, any_layer = run.pooled("mismatch/router_rate"), run.pooled("mismatch/token_any_rate")
    if router is None:
        return no_routes(run)
    compared = sum(row.get("mismatch/router_denominator") or 0 for row in run.rows)
    floor = _says_floor(run, "router_rate", "mismatch/router_rate", percent)
    floor = _with_stale(run, f"{sentence(floor)}.")
    if not router:
        of = f"0 of {compared:,.0f}" if compared else "none of the"
        return f"{of} (token, layer) pairs compared differ. {floor}"
    of = f" of {compared:,.0f} (token, layer) pairs" if compared else " of (token, layer) pairs"
    text = f"{percent(router)}{of} differ over the whole run"
    if any_layer is not None:
        text += f"; {percent(any_layer)} of tokens differ in at least one layer"
        by_layer = run.pooled_by_layer("mismatch/by_layer")
        if by_layer is not None:
            independent = 1 - np.prod(1 - by_layer)
            text += f" ({percent(independent)} if layers flipped independently)"
    return f"{text}. {floor}"


def _says_histogram(run: Run, entries: list[Entry]) -> str:
    texts = []
    for entry in entries:
        tokens_M = np.array(entry["tokens"])
        most, last = int(np.flatnonzero(tokens_M).max()), len(tokens_M) - 1
        if entry["floor"]:
            texts.append(f"{entry['label'].removeprefix('floor: ')} in at most {most}")
            continue
        total = int(tokens_M.sum())
        if not most:
            texts.append(f"0 of {total:,} tokens compared differ in any of {last} layers")
            continue
        mean = tokens_M @ np.arange(len(tokens_M)) / total
        texts.append(
            f"of {total:,} tokens {percent(tokens_M[0] / total)} agree in every layer; the mean is "
            f"{number(mean)} differing layers, the most {most} of {last}"
        )
    floors = [text for text, entry in zip(texts, entries, strict=True) if entry["floor"]]
    measured = [text for text, entry in zip(texts, entries, strict=True) if not entry["floor"]]
    ending = f"Tokens of the noise floor differ: {'; '.join(floors)}." if floors else ""
    ending = ending or sentence(stale(run) or "no noise floor was measured.")
    return " ".join([*(f"{text}." for text in measured), ending])


def _says_layers(run: Run) -> str:
    rates = run.pooled_by_layer("mismatch/by_layer")
    if rates is None:
        return no_routes(run)
    ids = run.layer_ids(len(rates))
    if not rates.any():
        return f"no mismatch in any of the {len(rates)} MoE layers."
    top, low = int(rates.argmax()), int(rates.argmin())
    text = (
        f"over the whole run layer {ids[top]} differs most ({percent(rates[top])}) and layer "
        f"{ids[low]} least ({percent(rates[low])})."
    )
    return _with_stale(run, text)


def _says_depth(run: Run) -> str:
    rates = run.pooled_by_layer("mismatch/by_layer")
    if rates is None:
        return no_routes(run)
    if len(rates) == 1:
        text = f"its one MoE layer differs for {percent(rates[0])} of tokens"
    else:
        half = len(rates) // 2
        first, second = float(rates[:half].mean()), float(rates[-half:].mean())
        text = (
            f"the mean rate is {percent(first)} in the lower half of the MoE layers and "
            f"{percent(second)} in the upper half"
        )
    if run.stale_steps:
        return _with_stale(run, f"{text}.")
    floors = []
    for side in _PASSES:
        found = [run.pooled_by_layer(f"noise/{side}_{kind}/by_layer") for kind in _PASSES[side]]
        found = [rates_L.max() for rates_L in found if rates_L is not None]
        if found:
            floors.append(f"{percent(max(found))} ({side})")
    return text + (
        f"; the floor of any layer is at most {' and '.join(floors)}."
        if floors
        else "; no noise floor by layer was measured."
    )


def _says_conditional(run: Run, panels: dict[str, list[Entry]]) -> str:
    if not any(panels.values()):
        return (
            no_routes(run)
            if run.is_dense
            else "no forward held to the engine's experts was made: analysed steps make one."
        )
    router, any_layer = (run.pooled(f"conditional/{n}") for n in ("router_rate", "token_any_rate"))
    if router is None:
        return "only its rates by layer were logged."
    steps, _ = run.series("conditional/router_rate")
    text = (
        f"at {plural(len(steps), 'step')}, {percent(router)} of (token, layer) pairs flip by "
        "themselves"
    )
    if any_layer is not None:
        text += f", {percent(any_layer)} of tokens in at least one layer"
    by_layer = run.pooled_by_layer("conditional/by_layer")
    if by_layer is not None and by_layer.any():
        top = int(by_layer.argmax())
        text += (
            f"; most in layer {run.layer_ids(len(by_layer))[top]} ({percent(float(by_layer[top]))})"
        )
    if (shared := run.pooled("conditional/gate_overlap")) is not None:
        at = len(run.series("conditional/gate_overlap")[0])
        text += f"; held and native gates overlap by {percent(shared)} in the mean"
        text += f" (at {plural(at, 'step')})" * (at < len(steps))
    return _with_stale(run, f"{text}.")


def _says_gap(run: Run) -> str:
    _, k3 = run.series("logp_gap/k3")
    _, largest = run.series("logp_gap/max_abs")
    mean = run.pooled("logp_gap/mean_abs")
    if mean is None:
        return "no log-prob gap was logged."
    text = f"|gap| is {number(mean)} nats in the mean over tokens"
    if k3:
        text += f", its KL estimate {number(run.pooled('logp_gap/k3'))}"
    if largest:
        worst = max(largest)
        text += f"; the largest of any token is {number(worst)}, a ratio of {number(np.exp(worst))}"
    if run.replay == "R3":
        text += ". Under R3 the trainer is held to the engine's experts in this gap, not in its own"
        text += " floor"
    floor = _says_floor(run, "logp_mean_abs", "logp_gap/mean_abs", number, sides=("trainer",))
    return f"{text}. {_with_stale(run, sentence(floor) + '.')}"


_TERMS = {
    "numerics": "numerics",
    "staleness": "staleness",
    "engine_routing": "engine routing",
    "update": "update",
    "routing_shift": "routing shift",
}
_UNSEEN = {"R2": "routing_shift", "R3": "engine_routing"}


def _says_decomposition(run: Run, panels: dict[str, list[Entry]]) -> str:
    means = {}
    for term, name in _TERMS.items():
        if values := run.series(f"gap/{term}/mean_abs")[1]:
            means[name] = run.pooled(f"gap/{term}/mean_abs")
            steps = len(values)
    if not means:
        if run.is_dense:
            return no_routes(run)
        return "the gap was not taken apart: the analysed steps of a run do that."
    (top, largest), *others = sorted(means.items(), key=lambda item: -item[1])
    at = plural(steps, "analysed step")
    if largest:
        rest = ", ".join(f"{name} {number(value)}" for name, value in others)
        text = f"{top} is the largest term: {number(largest)} nats in the mean over {at}"
        text += f"; {rest}." if rest else "."
    else:
        text = f"all {len(means)} terms are 0 at {at}."
    if unseen := _UNSEEN.get(run.replay):
        value = run.pooled(f"counterfactual/{unseen}/mean_abs")
        size = "not measured" if value is None else f"{number(value)} nats"
        text += (
            f" Under {run.replay} the loss sees these terms alone; {_TERMS[unseen]}, which it does "
            f"not see, is {size} (counterfactual)."
        )
    return text


ROUTING: list[Curves | HeatMap | ByLayer | Histogram | Panels] = [
    Curves(
        key="routing",
        title="Routing mismatch, free-running",
        metrics=only(
            ("mismatch/token_any_rate", "tokens, any layer"),
            ("mismatch/router_rate", "routers"),
            ("mismatch/slot_rate", "expert slots"),
        ),
        read="Share of tokens, of (token, layer) pairs and of expert slots in which engine and "
        "trainer, each routing freely, chose differently; 0 is agreement. Hollow "
        "marks are each side against itself, per (token, layer) pair: routers that lie no higher "
        "than they do say nothing about the other side.",
        says=_says_routing,
        is_share=True,
        from_zero=True,
        floor="router_rate",
    ),
    Histogram(
        key="histogram",
        title="Differing layers of a token, free-running",
        read="Share of tokens by the number of MoE layers in which they differ, over all steps; "
        "hollow marks are the noise floors of both sides, at the analysed steps. Where they meet "
        "the filled ones, so many differing layers are arithmetic.",
        says=_says_histogram,
    ),
    HeatMap(
        key="layers",
        title="Routing mismatch by layer and step, free-running",
        metric="mismatch/by_layer",
        read="Each cell is the share of a step's tokens whose expert set differs in that MoE "
        "layer; a bright row is a layer, a bright column a step. The next figure has the floor of "
        "each layer.",
        says=_says_layers,
    ),
    ByLayer(
        key="depth",
        title="Routing mismatch by depth, free-running",
        metric="mismatch/by_layer",
        label="engine against trainer",
        read="The same shares pooled over all steps, and each side against itself (hollow) over "
        "the analysed ones; a slope to the right means that differences pile up with depth.",
        says=_says_depth,
        floor=True,
    ),
    Panels(
        key="conditional",
        title="Conditional divergence: flips of single layers",
        parts=(
            Curves(
                key="conditional_steps",
                title="over steps",
                metrics=only(
                    ("conditional/token_any_rate", "tokens, any layer"),
                    ("conditional/router_rate", "routers"),
                ),
                is_share=True,
                points_only=True,
                from_zero=True,
            ),
            ByLayer(
                key="conditional_layers",
                title="by layer, pooled over steps",
                metric="conditional/by_layer",
                label="routers",
            ),
        ),
        read="The trainer held to the engine's experts: every layer gets the input that those "
        "experts made, and what counts is where its own top-k differs all the same. It is another "
        "quantity than the free-running mismatch, in which a flip changes the inputs of all later "
        "layers, and has no noise floor of its own.",
        says=_says_conditional,
    ),
    Curves(
        key="logp_gap",
        title="Log-prob gap",
        metrics=only(
            ("logp_gap/max_abs", "max |gap|"),
            ("logp_gap/mean_abs", "mean |gap|"),
            ("logp_gap/k3", "KL (k3)"),
        ),
        read="Gap = log p of the trainer before its update − log p of the engine, per sampled "
        "token; exp(gap) is an importance ratio that is off 1 before that update. Hollow "
        "marks are the mean |gap| of the trainer against itself; the engine's is not measured.",
        says=_says_gap,
        log_scale=True,
        floor="logp_mean_abs",
    ),
    TAILS,
    Panels(
        key="decomposition",
        title="The log-prob gap taken apart",
        parts=(
            Curves(
                key="seen",
                title="what the loss sees",
                metrics=only(*((f"gap/{t}/mean_abs", name) for t, name in _TERMS.items())),
                log_scale=True,
                points_only=True,
                from_zero=True,
            ),
            Curves(
                key="counterfactual",
                title="what replay keeps from the loss (counterfactual)",
                metrics=only(
                    *((f"counterfactual/{t}/mean_abs", _TERMS[t]) for t in _UNSEEN.values())
                ),
                log_scale=True,
                points_only=True,
                from_zero=True,
            ),
        ),
        read="Mean |term| per token at the analysed steps. The terms, signs kept, add up to log p "
        "of the trainer after its update − log p of the engine: arithmetic at the engine's "
        "experts (and, where generation overlaps with training, the staleness of the engine's "
        "weights), then the trainer's own experts, then the new weights at those experts, then the "
        "experts that the new weights choose. Under R3 engine routing and routing shift are gone "
        "and the others at the engine's experts, under R2 only routing shift is. Magnitudes do not "
        "add up, and in another order each term would come out somewhat different.",
        says=_says_decomposition,
    ),
]

FLOOR_SIDES = {side: [kind for kind in FLOORS if kind.startswith(side)] for side in _PASSES}
