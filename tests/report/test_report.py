"""The report: what it says is what the store holds, and it renders whatever a run left.

Not covered here: how the page looks, hovering and tapping (look at it in a browser). That the
drawings go through the numbers of the JSON is in test_drawings.
"""

import json
import re
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.report import plots, write_report
from moe_upgrpo.report.answers import TOKEN_FIGURES
from moe_upgrpo.report.figures import Curves, trend
from moe_upgrpo.report.page import FIGURES
from moe_upgrpo.report.plots import moving_average
from moe_upgrpo.report.runs import Run, load_runs
from moe_upgrpo.report.tokens import TokenLog, spans
from moe_upgrpo.store import RunFolder, read_metrics
from moe_upgrpo.store.metrics import metric
from tests.report.synthetic import make_run, random_tokens, write_tokens

ALL = [*FIGURES, *TOKEN_FIGURES]


def write(tmp_path, *runs):
    output = write_report(runs, tmp_path / "out" / "report.html")
    assert output == tmp_path / "out" / "report.html"
    return output.read_text(), json.loads((tmp_path / "out" / "report.json").read_text())


def run_of(tmp_path, *rows, config=None):
    run = RunFolder.create(tmp_path / "run", config or {})
    for row in rows:
        run.append_metrics(row)
    return run.path


def figure_of(data, key):
    return next(figure for figure in data["figures"] if figure["key"] == key)


def summary_of(data):
    return {row["name"]: row["values"] for row in data["summary"]}


def images_of(html):
    return re.findall(r'<svg class="plot".*?</svg>', html, re.DOTALL)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of 30 steps, its page and its data."""
    folder = tmp_path_factory.mktemp("full")
    path = make_run(folder / "run", steps=30)
    return path, *write(folder, path)


def test_every_figure_of_a_full_run_shows_the_stored_values(full):
    path, html, data = full
    rows = read_metrics(path)
    assert [figure["key"] for figure in data["figures"]] == [figure.key for figure in ALL]
    assert [figure["missing"] for figure in data["figures"]] == [[]] * len(ALL)
    # One beside the answer; conditional has 2 panels, tails 3, the decomposition without replay 1;
    # 6, 5, 5 and 2 of tokens.
    assert len(images_of(html)) == 1 + len(ALL) + 1 + 2 + 5 + 4 + 4 + 1
    for svg in images_of(html):
        assert ElementTree.fromstring(svg).tag == "svg"
    for figure in data["figures"]:
        assert figure["data"], figure["key"]
        for entry in figure["data"]:
            if "steps" in entry and "values" in entry:
                logged = [
                    (row["step"], row[entry["metric"]]) for row in rows if entry["metric"] in row
                ]
                assert list(zip(entry["steps"], entry["values"], strict=True)) == logged
    shown = {entry["label"] for entry in figure_of(data, "held_out")["data"]}
    assert shown == {"greedy", "pass@1", "pass@8"}
    heat = figure_of(data, "layers")["data"][0]
    assert heat["layer_ids"] == [1, 2, 3, 4]
    assert heat["steps"] == list(range(1, 31))
    assert heat["rates"] == [row["mismatch/by_layer"] for row in rows if row["step"]]


def test_figures_use_names_of_the_glossary(tmp_path):
    run = load_runs([make_run(tmp_path / "run", steps=1)])[0]
    parts = [part for figure in FIGURES for part in getattr(figure, "parts", [figure])]
    curves = [part for part in parts if isinstance(part, Curves)]
    names = [name for curve in curves for name, _ in curve.metrics(run)]
    names += [entry["metric"] for f in FIGURES for entry in f.data([run])]
    assert len(set(names)) > 40
    for name in names:
        metric(name)


def test_one_file_that_asks_for_nothing_from_outside(full):
    _, html, _ = full
    assert len(html.encode()) < 500_000  # that of `make train` is a tenth larger
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert attribute.startswith(("data:", "#"))
    assert "@import" not in html and not re.search(r"url\((?!#)", html) and "<script" not in html
    assert "http:" not in html and "https:" not in html
    for svg in images_of(html):
        loaded = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(address.startswith(("#", "data:")) for address in loaded)


def test_every_token_tells_the_same_to_mouse_finger_and_keyboard(full):
    """A token's label is what it tells, shown on hover and on focus; each can have the focus."""
    _, html, data = full
    boxes = re.findall(r'<span class="token(?: positive)?" ([^>]*)>', html)
    assert len(boxes) == sum(len(s["tokens"]) for s in data["sequences"]) > 0
    for box in boxes:
        assert 'tabindex="0"' in box and 'aria-label="position ' in box
    assert ".token:hover::after, .token:focus::after" in html and "attr(aria-label)" in html


def test_rates_of_a_run_are_pooled_from_counts(tmp_path):
    """Step 1: 10 of 100 pairs, step 2: 90 of 300. Pooled 100/400 = 25%, the mean of means is 20%.

    Layers: (0.1·100 + 0.5·300) / 400 = 40% and (0.1·100 + 0.1·300) / 400 = 10%; flipping
    independently, 1 − 0.6·0.9 = 46% of tokens would differ.
    """
    rows = [
        {
            "step": 1,
            "mismatch/router_rate": 0.1,
            "mismatch/token_any_rate": 0.2,
            "mismatch/by_layer": [0.1, 0.1],
            "mismatch/router_denominator": 100,
        },
        {
            "step": 2,
            "mismatch/router_rate": 0.3,
            "mismatch/token_any_rate": 0.4,
            "mismatch/by_layer": [0.5, 0.1],
            "mismatch/router_denominator": 300,
        },
    ]
    _, data = write(tmp_path, run_of(tmp_path, *rows, config={"moe_layers": [3, 7]}))
    assert summary_of(data)["Routers that differ"] == ["25%"]
    assert summary_of(data)["Tokens that differ in any layer"] == ["35%"]
    assert figure_of(data, "depth")["data"][0]["rates"] == pytest.approx([0.4, 0.1])
    assert figure_of(data, "routing")["says"][0]["text"] == (
        "25% of 400 (token, layer) pairs differ over the whole run; 35% of tokens differ in at "
        "least one layer (46% if layers flipped independently). No noise floor was measured."
    )
    assert figure_of(data, "layers")["says"][0]["text"] == (
        "Over the whole run layer 3 differs most (40%) and layer 7 least (10%)."
    )
    assert "40% in the lower half" in figure_of(data, "depth")["says"][0]["text"]


FLOOR = [
    {
        "step": step,
        "mismatch/router_rate": rate,
        "logp_gap/mean_abs": 0.02,
        "noise/trainer_repeat/router_rate": 0.0,
        "noise/trainer_batch_shape/router_rate": floor,
        "noise/engine_repeat/router_rate": 0.001,
        "noise/engine_batch_shape/router_rate": 0.005,
        "noise/trainer_repeat/logp_mean_abs": 0.0,
        "noise/trainer_batch_shape/logp_mean_abs": 0.0,
        "mismatch/histogram": [100 - round(100 * rate), round(100 * rate)],
        "noise/trainer_batch_shape/histogram": [100 - round(100 * floor), round(100 * floor)],
    }
    for step, rate, floor in ((2, 0.1, 0.01), (4, 0.3, 0.03))
]


def test_the_noise_floor_beside_the_mismatch_of_the_same_steps(tmp_path):
    """Floor (1% + 3%) / 2 = 2%, mismatch of those steps (10% + 30%) / 2 = 20%: 10 times.

    The step without an analysis, at 90%, stays out of the comparison.
    """
    html, data = write(tmp_path, run_of(tmp_path, {"step": 1, "mismatch/router_rate": 0.9}, *FLOOR))
    assert figure_of(data, "routing")["says"][0]["text"].endswith(
        "Noise floor at 2 analysed steps: the trainer differs from itself by 0% (the same forward "
        "twice) and 2%, 4 of 200 (another batch shape); the engine differs from itself by 0.1% "
        "(the same pass twice) and 0.5% (sampling against one pass over the whole sequence); "
        "engine and trainer on those steps by 20%, 40 of 200; no token rows tell by prompt whether "
        "that is above the largest floor."
    )
    assert figure_of(data, "logp_gap")["says"][0]["text"].endswith(
        "by 0 (the same forward twice) and 0 (another batch shape); engine and trainer on those "
        "steps by 0.02."
    )
    floors = [entry for entry in figure_of(data, "routing")["data"] if entry["floor"]]
    assert [(e["metric"], e["steps"], e["values"]) for e in floors] == [
        ("noise/trainer_repeat/router_rate", [2, 4], [0, 0]),
        ("noise/trainer_batch_shape/router_rate", [2, 4], [0.01, 0.03]),
        ("noise/engine_repeat/router_rate", [2, 4], [0.001, 0.001]),
        ("noise/engine_batch_shape/router_rate", [2, 4], [0.005, 0.005]),
    ]
    assert "was not measured in" not in html
    assert "floor: trainer twice (0)" in images_of(html)[1]
    assert summary_of(data)["Noise floor, routers, trainer"] == ["2% (2 of 3 steps)"]
    assert summary_of(data)["Noise floor, routers, engine"] == ["0.5% (2 of 3 steps)"]


@pytest.mark.parametrize(
    ("prompts", "flips", "floor", "text"),
    [
        (12, [1] * 10, [0] * 12, "10 of 48, above the floor (more than the largest floor in 10 of "
         "12 prompts and fewer in 0; sign flips by prompt, p = 0.001)."),
        (12, [1], [0] * 12, "1 of 48, more than the largest floor in 1 of 12 prompts and fewer in "
         "0: cannot be told from the floor (sign flips by prompt, p = 0.5)."),
        (12, [2, 2, 2, 2, 2, 2], [1] * 6 + [1] * 6, "12 of 48, no more than the largest floor."),
        (12, [2, 2, 2, 2, 2, 2], [1] * 6, "12 of 48, more than the largest floor in 6 of 12 "
         "prompts and fewer in 0: cannot be told from the floor (sign flips by prompt, p = "
         "0.016)."),
        (7, [2] * 7, [1], "14 of 28, more than the largest floor in 7 of 7 prompts and fewer in 0: "
         "too few prompts to tell from the floor."),
    ],
)  # fmt: skip
def test_above_the_noise_floor_is_a_paired_test_by_prompt(tmp_path, prompts, flips, floor, text):
    """A token of four layers for each prompt; `flips` of the first prompts, and their floor's."""
    own = np.zeros(prompts, int)
    own[: len(flips)] = flips
    again = np.zeros(prompts, int)
    again[: len(floor)] = floor
    histograms = [np.bincount(x, minlength=5).tolist() for x in (own, again)]
    row = {"step": 1, "mismatch/router_rate": own.mean() / 4, "mismatch/histogram": histograms[0]}
    name = "noise/engine_batch_shape"
    row |= {f"{name}/router_rate": again.mean() / 4, f"{name}/histogram": histograms[1]}
    path = run_of(tmp_path, row)
    columns = {
        "sequence": np.arange(prompts),
        "prompt": np.arange(prompts),
        "overlap": np.where(np.arange(4) < own[:, None], 1, 2),
        "noise_engine_batch_shape": again,
    }
    write_tokens(path, 1, columns, 4)
    _, data = write(tmp_path, path)
    if again.sum() >= own.sum():
        assert "no more than the largest floor." in figure_of(data, "routing")["says"][0]["text"]
    else:
        assert figure_of(data, "routing")["says"][0]["text"].endswith(text)


def test_stale_samples_are_not_held_against_a_floor(tmp_path):
    """Step 4 has other weights in the engine: its 30% and its floor of 3% stay out."""
    rows = [row | {"staleness/mean": float(row["step"] == 4)} for row in FLOOR]
    path = run_of(tmp_path, *(row | LAYERS for row in rows))
    html, data = write(tmp_path, path)
    says = {f["key"]: f["says"][0]["text"] for f in data["figures"]}
    note = (
        "t 1 of 2 steps the samples are of older weights than the trainer's (staleness/mean 1): an "
        "update lies between the two, and is in what differs."
    )
    assert data["notes"][0]["text"] == f"Generation overlaps with training: a{note}"
    for key in ("routing", "histogram", "layers", "depth", "logp_gap"):
        assert says[key].endswith(f". A{note}")
    assert "Noise floor at 1 analysed step of fresh samples: the trainer" in says["routing"]
    assert " on those steps by 10%, 5 of 20" in says["routing"]
    for key in ("histogram", "depth"):
        assert not any(entry["floor"] for entry in figure_of(data, key)["data"])
    floors = [e["steps"] for e in figure_of(data, "routing")["data"] if e["floor"]]
    assert floors == [[2]] * 4
    assert "equal weights" not in html and "at the engine's weights" not in html


def test_stale_samples_alone(tmp_path):
    _, data = write(tmp_path, run_of(tmp_path, *(row | {"staleness/mean": 1.0} for row in FLOOR)))
    text = figure_of(data, "routing")["says"][0]["text"]
    assert "on those steps by 20%, 40 of 200, with an update between them. At 2 of 2" in text
    assert "largest floor" not in text


def test_figures_of_fewer_steps_say_so(tmp_path):
    rows = [{"step": step, "mismatch/router_rate": 0.1} for step in (1, 2, 3)]
    rows[0] |= {"conditional/router_rate": 0.0, "noise/engine_repeat/router_rate": 0.0}
    _, data = write(tmp_path, run_of(tmp_path, *rows))
    found = summary_of(data)
    assert found["Routers that differ"] == ["10%"]
    assert found["Conditional flips, routers"] == ["0% (1 of 3 steps)"]
    assert found["Noise floor, routers, engine"] == ["0% (1 of 3 steps)"]


def test_a_run_killed_before_its_first_step_was_finished(tmp_path):
    path = run_of(tmp_path, {"step": 0, "eval/greedy": 0.5})
    tokens = random_tokens(np.random.default_rng(0), 4)
    for step in (1, 2, 3):
        write_tokens(path, step, tokens, 4)
    html, data = write(tmp_path, path)
    text = "o step finished; the token log has steps 1 to 3"
    assert summary_of(data)["Training steps"] == [f"n{text}"]
    assert f'<p class="alarm">N{text}.</p>' in html
    assert data["notes"][0]["text"] == f"N{text}."


def test_the_floor_of_one_side_alone(tmp_path):
    rows = [{k: v for k, v in row.items() if "engine" not in k} for row in FLOOR]
    html, data = write(tmp_path, run_of(tmp_path, *rows))
    text = figure_of(data, "routing")["says"][0]["text"]
    assert "; the engine's own was not measured; " in text
    assert "The engine's was not measured in run:" in " ".join(html.split())


def test_a_run_without_a_noise_floor_is_named(tmp_path):
    html, data = write(tmp_path, run_of(tmp_path, {"step": 1, "logp_gap/mean_abs": 0.1}))
    for side in ("trainer", "engine"):
        assert f"The {side}'s was not measured in run:" in " ".join(html.split())
    assert figure_of(data, "logp_gap")["says"][0]["text"].endswith("No noise floor was measured.")


LAYERS = {
    "mismatch/by_layer": [0.1, 0.3],
    "mismatch/histogram": [6, 3, 1],
    "noise/trainer_repeat/histogram": [10, 0, 0],
    "noise/trainer_repeat/by_layer": [0.0, 0.0],
    "noise/engine_batch_shape/histogram": [9, 1, 0],
    "noise/engine_batch_shape/by_layer": [0.0, 0.1],
}


def test_histograms_and_layers_beside_their_floors(tmp_path):
    """Counts add up over steps: 2 · (6, 3, 1); the mean is (3 + 2 · 1) / 10 = 0.5 layers."""
    rows = [{"step": step} | LAYERS for step in (1, 2)]
    html, data = write(tmp_path, run_of(tmp_path, *rows))
    found = {entry["metric"]: entry for entry in figure_of(data, "histogram")["data"]}
    assert {name: (entry["tokens"], entry["floor"]) for name, entry in found.items()} == {
        "mismatch/histogram": ([12, 6, 2], False),
        "noise/trainer_repeat/histogram": ([20, 0, 0], True),
        "noise/engine_batch_shape/histogram": ([18, 2, 0], True),
    }
    assert found["mismatch/histogram"]["shares"] == [0.6, 0.3, 0.1]
    assert figure_of(data, "histogram")["says"][0]["text"] == (
        "Of 20 tokens 60% agree in every layer; the mean is 0.5 differing layers, the most 2 of 2. "
        "Tokens of the noise floor differ: trainer twice in at most 0; engine, one pass in at most "
        "1."
    )
    depth = {entry["metric"]: entry["rates"] for entry in figure_of(data, "depth")["data"]}
    assert depth == {
        "mismatch/by_layer": pytest.approx([0.1, 0.3]),
        "noise/trainer_repeat/by_layer": [0, 0],
        "noise/engine_batch_shape/by_layer": pytest.approx([0, 0.1]),
    }
    assert figure_of(data, "depth")["says"][0]["text"].endswith(
        "the floor of any layer is at most 0% (trainer) and 10% (engine)."
    )
    assert len(images_of(html)) == 1 + 3


def test_conditional_divergence_stands_alone(tmp_path):
    """In no figure with a free-running metric; no free-running metric in its figure."""
    row = {
        "step": 3,
        "mismatch/router_rate": 0.2,
        "mismatch/by_layer": [0.1, 0.3],
        "conditional/router_rate": 0.01,
        "conditional/token_any_rate": 0.02,
        "conditional/by_layer": [0.015, 0.005],
        "conditional/gate_overlap": 0.996,
    }
    _, data = write(tmp_path, run_of(tmp_path, row, config={"moe_layers": [3, 7]}))
    for figure in data["figures"]:
        names = {entry.get("metric", "").split("/")[0] for entry in figure["data"]}
        assert ("conditional" in names) == (figure["key"] == "conditional")
        assert not {"conditional", "mismatch"} <= names
    figure = figure_of(data, "conditional")
    assert [entry["panel"] for entry in figure["data"]] == [
        "conditional_steps",
        "conditional_steps",
        "conditional_layers",
    ]
    assert figure["says"][0]["text"] == (
        "At 1 step, 1% of (token, layer) pairs flip by themselves, 2% of tokens in at least one "
        "layer; most in layer 3 (1.5%); held and native gates overlap by 99.6% in the mean."
    )
    assert summary_of(data)["Conditional flips, routers"] == ["1%"]


def test_the_largest_term_of_the_gap(tmp_path):
    """Means over the two steps: routing shift (1 + 5) / 2 = 3, though update has 2 at step 1."""
    terms = ("numerics", "engine_routing", "update", "routing_shift")
    rows = [
        {"step": step} | {f"gap/{term}/mean_abs": v for term, v in zip(terms, values, strict=True)}
        for step, values in ((1, (0, 0.5, 2, 1)), (20, (0, 0.5, 0, 5)))
    ]
    _, data = write(tmp_path, run_of(tmp_path, *rows))
    figure = figure_of(data, "decomposition")
    assert figure["says"][0]["text"] == (
        "Routing shift is the largest term: 3 nats in the mean over 2 analysed steps; update 1, "
        "engine routing 0.5, numerics 0."
    )
    assert [entry["values"] for entry in figure["data"]] == [[0, 0], [0.5, 0.5], [2, 0], [1, 5]]
    assert {entry["panel"] for entry in figure["data"]} == {"seen"}


def test_overlapped_generation_adds_a_term(tmp_path):
    terms = {"numerics": 0.1, "staleness": 0.4, "engine_routing": 0.3}
    row = {"step": 1, "staleness/mean": 1.0}
    row |= {f"gap/{term}/mean_abs": value for term, value in terms.items()}
    _, data = write(tmp_path, run_of(tmp_path, row))
    assert figure_of(data, "decomposition")["says"][0]["text"] == (
        "Staleness is the largest term: 0.4 nats in the mean over 1 analysed step; engine routing "
        "0.3, numerics 0.1."
    )
    assert summary_of(data)["Staleness of the samples, steps"] == ["1"]


@pytest.mark.parametrize(
    ("replay", "seen", "unseen"),
    [
        ("R2", ["numerics", "engine_routing", "update"], "routing_shift"),
        ("R3", ["numerics", "update"], "engine_routing"),
    ],
)
def test_the_decomposition_under_replay(tmp_path, replay, seen, unseen):
    """The part that replay keeps from the loss is drawn apart and named as such."""
    row = {"step": 1} | {f"gap/{term}/mean_abs": 0.1 * (i + 1) for i, term in enumerate(seen)}
    row |= {f"counterfactual/{unseen}/mean_abs": 0.7}
    html, data = write(tmp_path, run_of(tmp_path, row, config={"replay": replay}))
    figure = figure_of(data, "decomposition")
    assert [(entry["panel"], entry["metric"]) for entry in figure["data"]] == [
        *(("seen", f"gap/{term}/mean_abs") for term in seen),
        ("counterfactual", f"counterfactual/{unseen}/mean_abs"),
    ]
    assert figure["says"][0]["text"].endswith(
        f" Under {replay} the loss sees these terms alone; {unseen.replace('_', ' ')}, which it "
        "does not see, is 0.7 nats (counterfactual)."
    )
    assert "What replay keeps from the loss (counterfactual)" in html


def test_the_cost_of_the_decomposition(tmp_path):
    """(1 + 2) of (4 + 8) seconds; the step without one, of 100 s, does not count."""
    rows = [
        {"step": 1, "time/total": 4.0, "time/decomposition": 1.0},
        {"step": 2, "time/total": 100.0},
        {"step": 3, "time/total": 8.0, "time/decomposition": 2.0},
    ]
    _, data = write(tmp_path, run_of(tmp_path, *rows))
    name = "Decomposition, share of analysed steps' time"
    assert summary_of(data)[name] == ["25.0% of 2 steps"]


def test_alarms_with_their_meaning_and_without(tmp_path):
    rows = [
        {"step": step, "alarms": names}
        for step, names in enumerate([["hot"], ["hot", "cold"], [], ["hot"]], start=1)
    ]
    html, data = write(tmp_path, run_of(tmp_path, *rows, config={"alarms": {"hot": "it burns."}}))
    nothing = {"run": "run", "value": None, "meaning": None, "next": None}
    assert data["alarms"] == [
        nothing | {"name": "hot", "steps": [1, 2, 4], "count": 3, "meaning": "it burns."},
        nothing | {"name": "cold", "steps": [2], "count": 1},
    ]
    assert "<b>hot</b>, 3 times, at steps 1 to 2 and 4.</summary> It burns.</details>" in html
    assert "<b>cold</b>, 1 time, at step 2.</p>" in html
    assert summary_of(data)["Alarms"] == ["hot (3×), cold (1×)"]


@pytest.mark.parametrize(
    ("row", "text"),
    [({"alarms": []}, "No alarm was raised."), ({}, "The run did not look for alarms.")],
)
def test_no_alarm(tmp_path, row, text):
    html, data = write(tmp_path, run_of(tmp_path, {"step": 1} | row))
    assert data["alarms"] == [] and text in html


def test_an_alarm_says_what_was_seen_and_what_to_run(tmp_path):
    rows = [{"step": i, "alarms": ["hot"], "alarms/hot": i / 10} for i in (1, 2)]
    html, data = write(tmp_path, run_of(tmp_path, *rows))
    assert "<b>hot</b>, 2 times, at steps 1 to 2 (0.2 at the last).</p>" in html
    assert data["alarms"][0]["value"] == 0.2
    means = "It burns. Likely cause: fire. Next: put it out."
    path = run_of(tmp_path / "told", *rows, config={"alarms": {"hot": means}})
    html, data = write(tmp_path, path)
    assert (
        "(0.2 at the last). <b>Next:</b> put it out.</summary> It burns. Likely cause: fire.<"
    ) in html
    assert data["alarms"][0]["next"] == "put it out."


def test_steps_of_an_alarm_that_rings_always():
    assert spans([3]) == "step 3"
    assert spans(list(range(1, 301))) == "steps 1 to 300"
    text = spans(list(range(0, 100, 2)))
    assert text.startswith("steps 0, 2, ") and text.endswith(", 22 and 38 more places")


def test_a_probe_has_no_reward_and_says_so(tmp_path):
    row = {"step": 1, "mismatch/router_rate": 0.1, "logp_gap/mean_abs": 0.01}
    html, data = write(tmp_path, run_of(tmp_path, row, config={"loss": "none (probe)"}))
    reason = "A probe samples and compares: it has no rewards and trains nothing."
    for key in ("reward", "held_out", "clip", "kl", "grad_norm"):
        assert figure_of(data, key)["says"][0]["text"] == reason
        assert figure_of(data, key)["data"] == []
    assert html.count(reason) == 2  # Learning and updates
    assert data["notes"][0]["text"].startswith("A probe: engine and trainer are compared")


def test_throughput_is_tokens_over_seconds_not_a_mean_of_rates(tmp_path):
    """100 tokens in 1 s and 100 in 4 s are 40 tokens/s; the rates' mean would be 62.5."""
    rows = [
        {"step": i, "tokens/sampled": 100, "time/total": seconds, "time/update": 1.0}
        for i, seconds in ((1, 1.0), (2, 4.0))
    ]
    _, data = write(tmp_path, run_of(tmp_path, *rows))
    assert summary_of(data)["Sampled tokens per second"] == ["40"]
    assert summary_of(data)["Time of a step"][0].endswith("update 40%, logging 0%")


def test_waiting_is_a_share_of_its_phase(tmp_path):
    """Half of 1 s and a tenth of 3 s are a fifth of the 4 s of updates."""
    rows = [
        {"step": i, "time/total": 9.0, "time/update": seconds, "time/waiting/update": share}
        for i, seconds, share in ((1, 1.0, 0.5), (2, 3.0, 0.1))
    ]
    _, data = write(tmp_path, run_of(tmp_path, *rows))
    assert summary_of(data)["Ranks waited"] == ["20% of update"]


def test_held_out_accuracy_in_words(tmp_path):
    """The standard error of 0.5 on 100 problems is √(0.25/100) = 5%."""
    before = {"step": 0, "eval/greedy": 0.25, "eval/pass@1": 0.2, "eval/problems": 100}
    after = {"step": 9, "eval/greedy": 0.5, "eval/pass@1": 0.4, "eval/problems": 100}
    _, data = write(tmp_path, run_of(tmp_path, before, after))
    assert summary_of(data)["Held-out greedy, before → after"] == ["25% → 50%"]
    assert figure_of(data, "held_out")["says"][0]["text"] == (
        "Greedy accuracy goes from 25% at step 0 to 50% at step 9, on 100 problems "
        "(standard error up to 5%)."
    )


NO_TOKENS = TokenLog(note="none")


def trend_of(*values):
    rows = [{"step": step, "x": value} for step, value in enumerate(values, start=1)]
    run = Run(label="run", path=None, config={}, environment={}, rows=rows, tokens=NO_TOKENS)
    return trend(run, "x", "x")


def test_trend_in_words():
    """For 0,1,0,1,0,1 the means of 3 are 1/3 and 2/3, far within the noise of single steps."""
    assert trend_of() == "x was not logged."
    assert trend_of(2) == "x is 2 at step 1, the only one logged."
    assert trend_of(0.4375, 0.5, 0.3125) == (
        "x is 0.438 at step 1 and 0.312 at step 3: 3 steps are too few to say whether it changes."
    )
    rising = trend_of(*range(10))
    assert rising == "x rises from 2 to 7 between the first and the last 5 steps."
    assert trend_of(*range(9, -1, -1)).startswith("x falls from 7 to 2")
    assert trend_of(0, 1, 0, 1, 0, 1) == (
        "x is 0.333 in the first and 0.667 in the last 3 steps: no change beyond the noise from "
        "step to step."
    )
    assert "no change" in trend_of(1, 1, 1, 1, 1)


def test_the_noise_of_a_reward_is_at_least_its_standard_error():
    """Per step 0.5 / √(128 / 4) = 0.088; 5 steps fall evenly by 0.02: only without it a fall."""
    rows = [{"step": i, "reward/mean": 0.5 - 0.02 * i} for i in range(1, 6)]
    spread = {"reward/std": 0.5, "response/length_mean": 4.0, "tokens/sampled": 128}
    about = {"label": "run", "path": None, "config": {}, "environment": {}, "tokens": NO_TOKENS}
    for more, text in (({}, "reward falls from"), (spread, "no change beyond the noise")):
        run = Run(rows=[row | more for row in rows], **about)
        assert text in trend(run, "reward/mean", "reward")


def test_moving_average():
    """60 points: the mean of 60 // 20 | 1 = 3; of 2 at either end."""
    values = np.arange(60.0)
    values[30] = 33
    average = moving_average(values)
    assert average[[0, 1, 29, 30, 31, 59]].tolist() == [0.5, 1, 30, 31, 32, 58.5]


def test_a_run_of_one_step(tmp_path):
    path = run_of(tmp_path, {"step": 1, "reward/mean": 0.5, "mismatch/by_layer": [0.25]})
    html, data = write(tmp_path, path)
    assert figure_of(data, "reward")["says"][0]["text"] == (
        "Mean reward is 0.5 at step 1, the only one logged."
    )
    assert summary_of(data)["Reward, beginning → end"] == ["0.5"]
    assert figure_of(data, "depth")["says"][0]["text"] == (
        "Its one MoE layer differs for 25% of tokens; no noise floor by layer was measured."
    )
    assert len(images_of(html)) == 1 + 3


def test_missing_metrics_are_said_to_be_missing(tmp_path):
    html, data = write(tmp_path, run_of(tmp_path, {"step": 1, "reward/mean": None}))
    assert images_of(html) == []
    shown = unescape(html[html.index("<body>") :])
    assert "<figure>" not in shown
    assert all(f'<span id="{figure.key}">{figure.title}</span>' in shown for figure in ALL)
    assert all(figure["says"][0]["text"] for figure in data["figures"])
    assert list(summary_of(data)) == ["Training steps"]


def test_gaps_in_a_curve_and_in_the_heat_map(tmp_path):
    """A non-finite value is stored as null: it leaves out a point, and does not enter a mean."""
    path = run_of(
        tmp_path,
        {"step": 1, "reward/mean": 0.5, "mismatch/by_layer": [float("nan"), 0.2]},
        {"step": 2, "reward/mean": float("inf"), "mismatch/by_layer": [0.4, 0.4]},
    )
    _, data = write(tmp_path, path)
    assert figure_of(data, "reward")["data"][0]["values"] == [0.5]
    assert figure_of(data, "layers")["data"][0]["rates"] == [[None, 0.2], [0.4, 0.4]]
    assert figure_of(data, "depth")["data"][0]["rates"] == pytest.approx([0.4, 0.3])


def test_no_mismatch_is_reported_as_none(tmp_path):
    row = {
        "step": 1,
        "mismatch/router_rate": 0.0,
        "mismatch/token_any_rate": 0.0,
        "mismatch/by_layer": [0.0, 0.0],
        "mismatch/router_denominator": 50,
        "mismatch/histogram": [25, 0, 0],
        "noise/trainer_batch_shape/router_rate": 0.002,
        "logp_gap/mean_abs": 0.0,
        "logp_gap/k3": 0.0,
        "logp_gap/max_abs": 0.0,
    }
    html, data = write(tmp_path, run_of(tmp_path, row))
    assert data["notes"][1]["text"] == ("No mismatch at all: 0 of 50 (token, layer) pairs differ.")
    assert figure_of(data, "routing")["says"][0]["text"] == (
        "0 of 50 (token, layer) pairs compared differ. Noise floor at 1 analysed step: the trainer "
        "differs from itself by 0.2% (another batch shape); the engine's own was not measured; "
        "engine and trainer on those steps by 0%, 0 of 50."
    )
    assert figure_of(data, "histogram")["says"][0]["text"].startswith(
        "0 of 25 tokens compared differ in any of 2 layers. "
    )
    assert figure_of(data, "layers")["says"][0]["text"] == "No mismatch in any of the 2 MoE layers."
    assert len(images_of(html)) == 1 + 5


def test_a_dense_run(tmp_path):
    html, data = write(tmp_path, make_run(tmp_path / "run", steps=3, layers=0))
    assert "dense" in html
    assert figure_of(data, "layers")["data"] == []
    assert figure_of(data, "routing")["says"][0]["text"] == "The model has no MoE layer."
    routing = ("routing", "histogram", "layers", "depth", "conditional", "decomposition")
    left_out = "; ".join(
        f'<span id="{key}">{figure_of(data, key)["title"]}</span>' for key in routing
    )
    assert f"Not shown: {left_out}. The model has no MoE layer." in html


def test_runs_overlaid(tmp_path):
    a = make_run(tmp_path / "a" / "up", steps=4)
    b = make_run(tmp_path / "b" / "grpo", loss="grpo", steps=6, layers=2, k=4)
    html, data = write(tmp_path, a, b)
    assert [run["label"] for run in data["runs"]] == ["up", "grpo"]
    assert [entry["run"] for entry in figure_of(data, "reward")["data"]] == ["up", "grpo"]
    # A heat map for each; panels as in a run alone.
    assert len(images_of(html)) == 1 + len(ALL) + 1 + 1 + 2 + 5 + 4 + 4 + 1
    greedy = summary_of(data)["Held-out pass@8"]
    assert greedy == ["55% → 95%", "–"]
    assert all([s["run"] for s in f["says"]] == ["up", "grpo"] for f in data["figures"])
    assert "<b>grpo:</b>" in html


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    paths = [run_of(tmp_path / name, {"step": 1}) for name in "ab"]
    _, data = write(tmp_path, *paths)
    assert [run["label"] for run in data["runs"]] == [str(path) for path in paths]


def test_what_a_config_says_is_text_not_markup(tmp_path):
    path = run_of(tmp_path, {"step": 1}, config={"loss": "<script>alert(1)</script>"})
    html, _ = write(tmp_path, path)
    assert "<script" not in html and "&lt;script&gt;" in html


def test_only_a_run_whose_positives_have_no_ratio_reads_of_it(tmp_path):
    for loss, says in (("gspo", False), ("up-gspo", True), ("pro-grpo", True)):
        run = run_of(tmp_path / loss, {"step": 1}, config={"loss": loss})
        html, _ = write(tmp_path, run)
        assert (f"without a ratio, as {loss} has it" in " ".join(html.split())) is says


def test_the_same_store_gives_the_same_page(full, tmp_path):
    path, *page = full
    assert list(write(tmp_path, path)) == page


def test_bad_folders(tmp_path):
    output = tmp_path / "report.html"
    with pytest.raises(UserError, match="no run folder given"):
        write_report([], output)
    with pytest.raises(UserError, match="is not a run folder"):
        write_report([tmp_path], output)
    empty = RunFolder.create(tmp_path / "empty", {}).path
    with pytest.raises(UserError, match=r"empty holds no metrics\.jsonl"):
        write_report([empty], output)
    run = make_run(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="given twice"):
        write_report([run, tmp_path / "x" / ".." / "run"], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"steps": 1}, ["A run of one step: nothing here says how anything changes."]),
        (
            {"steps": 2, "layers": 0},
            ["A dense model: it has no MoE layer and so no routing figures."],
        ),
        (
            {"steps": 2, "level": "sampled", "share": 0.9},
            ["Figures by token are of a sample: 90% of the sequences."],
        ),
        (
            {"steps": 2, "level": "aggregate"},
            [
                "No figures by token: this run kept its token log at level aggregate: its metrics, "
                "and no token rows."
            ],
        ),
        ({"steps": 2}, []),
    ],
)
def test_what_is_special_about_a_run_comes_first(tmp_path, monkeypatch, options, texts):
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])
    html, data = write(tmp_path, make_run(tmp_path / "run", **options))
    assert [note["text"] for note in data["notes"]] == texts
    head = html[: html.index("What was run")]
    assert all(text in head for text in texts)


def test_a_long_run_of_many_layers_makes_a_page_of_sane_size(tmp_path):
    """300 steps and 48 layers, with 6 sequences shown of 400 tokens each."""
    path = make_run(tmp_path / "run", steps=300, layers=48, level="aggregate")
    tokens = random_tokens(np.random.default_rng(0), 48, sequences=6, length=450)
    write_tokens(path, 300, tokens, 48)
    html, data = write(tmp_path, path)
    assert len(re.findall('class="token[ "]', html)) == 6 * 400
    assert len(html) < 4e6
    assert len(json.dumps(data)) < 4e6
