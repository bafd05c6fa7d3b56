"""Sequences on the page: which are shown, and that a token shows what was logged of it.

Not covered: how the boxes look, hovering and tapping.
"""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_upgrpo.report import plots, write_report
from moe_upgrpo.report.sequences import MAX_TOKENS, drawn
from moe_upgrpo.store import RunFolder
from moe_upgrpo.store.parquet import write_checked
from moe_upgrpo.store.texts import write_prompts, write_vocabulary
from tests.report.synthetic import make_run, write_tokens


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing takes most of a report's time, and nothing here looks at it."""
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])


@pytest.fixture
def run(tmp_path):
    """A run of two steps without tokens."""
    folder = RunFolder.create(tmp_path / "run", {})
    for step in (1, 2):
        folder.append_metrics({"step": step, "reward/mean": 0.5})
    return folder.path


def shown(run):
    output = write_report([run], run / "report.html")
    return output.read_text(), json.loads(output.with_suffix(".json").read_text())["sequences"]


# Layers 1 and 2, top-2. Rows out of order: position 6 comes before 5.
ROLLOUT = [[[0, 1], [0, 1]], [[4, 0], [0, 1]], [[6, 7], [6, 7]]]
TRAIN = [[[0, 1], [0, 1]], [[0, 2], [3, 2]], [[7, 6], [6, 7]]]
THREE = {
    "sequence": [0, 0, 1],
    "position": [6, 5, 5],
    "token_id": [11, 12, 13],
    "reward": [1.0, 1.0, 0.0],
    "advantage": [0.5, 0.5, -0.5],
    "overlap": [[2, 2], [1, 0], [2, 2]],
    "logp_old": [-1.0, -1.0, -1.0],
    "logp_rollout": [-1.25, -0.5, -1.0],
    "ratio": [1.0, 1.25, 1.0],
}
ROUTES = {"rollout_routes": ROLLOUT, "train_routes": TRAIN}


def test_a_token_shows_what_was_logged(run):
    """Gaps of sequence 0: −1 + 0.5 = −0.5 at position 5, −1 + 1.25 = 0.25 at position 6."""
    write_tokens(run, 1, THREE | {"logp_old": [-9.0] * 3}, 2)
    write_tokens(run, 2, THREE | ROUTES, 2)
    html, found = shown(run)
    assert [(s["step"], s["sequence"], s["reward"], s["length"]) for s in found] == [
        (2, 0, 1, 2),
        (2, 1, 0, 1),
    ]
    assert found[0]["tokens"] == [
        {
            "position": 5,
            "token_id": 12,
            "logp_rollout": -0.5,
            "logp_old": -1,
            "ratio": 1.25,
            "advantage": 0.5,
            "gap": -0.5,
            "layers": [
                {"layer": 1, "shared": 1, "rollout": [0, 4], "train": [0, 2]},
                {"layer": 2, "shared": 0, "rollout": [0, 1], "train": [2, 3]},
            ],
        },
        {
            "position": 6,
            "token_id": 11,
            "logp_rollout": -1.25,
            "logp_old": -1,
            "ratio": 1,
            "advantage": 0.5,
            "gap": 0.25,
            "layers": [],
        },
    ]
    assert (
        "position 5, token id 12\nlog p: engine -0.5, trainer -1, gap -0.5\nratio 1.25 at the last "
        "optimizer visit\nadvantage 0.5\nlayer 1: engine 0 4 / trainer 0 2\nlayer 2: engine 0 1 / "
        "trainer 2 3"
    ) in html
    assert (
        "The largest |gap| shown of step 2 is 0.5 nats, at position 5 of sequence 0, where 2 of 2 "
        "MoE layers differ."
    ) in html


def test_without_routes_the_shared_experts_are_counted(run):
    write_tokens(run, 1, THREE, 2)
    html, found = shown(run)
    assert found[0]["tokens"][0]["layers"] == [
        {"layer": 1, "shared": 1},
        {"layer": 2, "shared": 0},
    ]
    assert "layer 2: experts shared: 0" in html


def test_routes_that_cannot_be_read_are_named_and_the_rest_is_shown(run):
    """The trainer's experts of the second token overwritten with bytes that say nothing."""
    file = write_tokens(run, 1, THREE | ROUTES, 2)
    table = pq.read_table(file)
    at = table.column_names.index("train_experts")
    broken = [
        b"\xff" * 9 if difference else b"" for difference in table["train_experts"].to_pylist()
    ]
    table = table.set_column(at, table.field(at), pa.array(broken, pa.large_binary()))
    write_checked(table, file)
    html, found = shown(run)
    assert found[0]["tokens"][0]["layers"] == [
        {"layer": 1, "shared": 1},
        {"layer": 2, "shared": 0},
    ]
    assert "Routes not readable: step-000001-rank-0000.parquet: step 1, sequence 0" in html


def test_which_sequences_are_shown(run):
    """Twenty with one token each: gaps grow with the number, 2 and 1 have one and two mismatches,
    3 and 4 the best rewards, 5 and 6 the worst."""
    overlap = np.full((20, 2), 2)
    overlap[2, 0] = overlap[1, 0] = overlap[1, 1] = 1
    reward = np.full(20, 0.5)
    reward[[3, 4]], reward[[5, 6]] = 1, 0
    rows = {
        "sequence": np.arange(20),
        "overlap": overlap,
        "logp_old": np.arange(20) / 10,
        "reward": reward,
    }
    write_tokens(run, 1, rows, 2)
    _, found = shown(run)
    assert [s["sequence"] for s in found[:8]] == [19, 18, 1, 2, 3, 4, 5, 6]
    assert [s["chosen"] for s in found[::2]] == [
        "one of the largest |gap|",
        "one of the most mismatched layers per token",
        "one of the best rewards",
        "one of the worst rewards",
        "drawn at random",
    ]
    assert {s["sequence"] for s in found[8:]} <= {0, *range(7, 18)} and len(found) == 10


def test_prompts_and_responses_are_read_as_text(run):
    """Tokens 11 to 13 and a prompt of 1 and 2; é comes in two bytes."""
    write_tokens(run, 1, THREE, 2)
    write_prompts(run / "tokens", 1, 0, {0: [1, 2]})
    write_vocabulary(run, {1: b"Say ", 2: b"<b>: ", 11: b"\xa9!", 12: b" caf\xc3", 13: b"no"})
    html, found = shown(run)
    assert found[0]["prompt_text"] == "Say <b>: "
    assert [token["text"] for token in found[0]["tokens"]] == [" caf", "é!"]
    assert '<span class="prompt">Say &lt;b&gt;: </span>' in html
    assert "position 5, token id 12: &#39; caf&#39;\n" in html and ">é!</span>" in html
    assert "no vocabulary" not in html
    # Layers 1 and 2 of the first of the two tokens differ.
    assert '<path d="M0 0h1v1h-1zM0 1h1v1h-1z"/>' in html


def test_without_a_vocabulary_ids_are_shown_and_said_to_be(run):
    write_tokens(run, 1, THREE, 2)
    html, found = shown(run)
    assert found[0]["prompt_text"] is None and "text" not in found[0]["tokens"][0]
    assert "the run keeps no vocabulary" in html and ">12</span>" in html


CUT = "of which 400 are shown from number {} on"


def test_a_long_response_is_cut_and_says_so(run):
    write_tokens(run, 1, {"sequence": [0] * 500, "position": np.arange(500)}, 2)
    html, (found,) = shown(run)
    assert len(found["tokens"]) == MAX_TOKENS == 400
    assert found["length"] == 500
    assert found["tokens"][-1]["position"] == 399
    assert len(re.findall('class="token[ "]', html)) == 400
    assert " ".join(html.split()).count(CUT.format(1)) == 1


def test_the_largest_gap_of_a_long_response_is_shown(run):
    """At 250 of 1000: 200 tokens before it, from 50 on; at 450 of 500 there are only 100 to cut."""
    for step, (length, worst, first) in enumerate([(1000, 250, 50), (500, 450, 100)], start=1):
        gap = np.where(np.arange(length) == worst, 2.0, 0.1)
        rows = {"sequence": [0] * length, "position": np.arange(length), "logp_old": gap}
        write_tokens(run, step, rows, 2)
        html, (found,) = shown(run)
        assert [t["position"] for t in found["tokens"]] == list(range(first, first + 400))
        assert CUT.format(first + 1) in " ".join(html.split())


def test_what_the_source_does_not_know_is_no_gap(run):
    """A stack that makes no forward at the old weights: nothing is coloured, and nothing broken."""
    unknown = dict.fromkeys(("logp_old", "ratio"), np.ma.masked_all(3))
    write_tokens(run, 1, THREE | unknown, 2)
    html, found = shown(run)
    assert "Of step 1 no log-probs at the old weights are known, so that there is no gap." in html
    assert "one of the largest" not in html and "not finite" not in html
    assert "trainer not known, gap not known\nratio not known at the last" in html
    assert "--gap:" not in html.split("<body>")[1] and "--ratio:" not in html.split("<body>")[1]
    assert {"logp_old", "ratio", "gap"}.isdisjoint(found[0]["tokens"][0])


def test_a_ratio_that_cannot_be_is_shown_as_the_largest():
    token = dict.fromkeys(("position", "token_id", "logp_rollout", "logp_old", "advantage"), 1)
    for ratio in (-1.0, 0.0, None):
        fills = drawn(token | {"gap": 0.0, "ratio": ratio, "layers": []}, 4)["fills"]
        assert fills["ratio"] == 1


def test_texts_and_prompts_are_text_not_markup(run):
    evil = b'</span></body><script>alert(1)</script><img src=x onerror=alert(2)>" onfocus="x'
    write_tokens(run, 1, THREE, 2)
    write_prompts(run / "tokens", 1, 0, {0: [1]})
    write_vocabulary(run, {i: evil for i in (1, 11, 12, 13)})
    html, found = shown(run)
    assert found[0]["prompt_text"] == found[0]["tokens"][0]["text"] == evil.decode()
    assert html.count("</body>") == 1 and "<script" not in html and "<img" not in html
    # As text, of which no quotation mark ends an attribute.
    assert html.count("&lt;script&gt;alert(1)") > 4 and 'onfocus="x' not in html


def test_a_gap_that_is_no_number_comes_first(run):
    write_tokens(run, 1, THREE | {"logp_old": [-1.0, -1.0, float("nan")]}, 2)
    html, found = shown(run)
    assert found[0]["sequence"] == 1
    assert found[0]["tokens"][0]["gap"] is None
    assert "Sequence 1 of step 1 holds a gap that is no number." in html


def test_dense_and_without_tokens(tmp_path):
    _, found = shown(make_run(tmp_path / "dense", steps=1, layers=0))
    assert len(found) == 8  # none has mismatched layers or another reward
    assert all(token["layers"] == [] for s in found for token in s["tokens"])
    html, found = shown(make_run(tmp_path / "aggregate", steps=1, level="aggregate"))
    assert found == []
    assert html.count("This run kept its token log at level aggregate") > 1


@pytest.mark.parametrize("gap, fill", [(0.0, 0), (0.01, 0), (-0.1, 0.5), (1.0, 1), (9.0, 1)])
def test_colour_by_hand(gap, fill):
    """log(0.1 / 0.01) is half of log(1 / 0.01)."""
    names = ("position", "token_id", "logp_rollout", "logp_old", "ratio", "advantage")
    token = dict.fromkeys(names, 1) | {"gap": gap, "layers": []}
    assert drawn(token, 4)["fills"]["gap"] == fill
    assert drawn(token, 4)["line"] == 0
    # Two pixels and three more where all layers differ.
    layers = [{"layer": i, "shared": 1} for i in range(4)]
    assert drawn(token | {"layers": layers}, 4)["line"] == 5
    assert drawn(token | {"gap": None}, 4)["fills"]["gap"] == 1
    # log 0.5 is beyond 0.01 by log(0.69 / 0.01) / log(100) = 0.92; half of 3 nats; −1 of 2.
    other = token | {"ratio": 0.5, "entropy": 1.5, "advantage": -1.0, "layers": layers[:1]}
    fills = {"ratio": 0.92, "entropy": 0.5, "advantage": 0.5, "mismatch": 0.25}
    assert drawn(other, 4)["fills"] == fills | {"gap": fill}
    assert not drawn(other, 4)["positive"]


def test_a_token_names_some_layers_only():
    names = ("position", "token_id", "logp_rollout", "logp_old", "ratio", "gap", "advantage")
    layers = [{"layer": i, "shared": 1} for i in range(20)]
    about = drawn(dict.fromkeys(names, 1) | {"layers": layers}, 48)["about"]
    assert about.endswith("layer 11: experts shared: 1\nand 8 more layers")
