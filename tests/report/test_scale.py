"""No quantity of a run is computed twice, and token rows are read file by file."""

from collections import Counter

import numpy as np
import pytest

from moe_upgrpo.report import plots, tokens
from moe_upgrpo.report.figures import MAX_POINTS, thinned
from moe_upgrpo.report.page import write_report
from moe_upgrpo.report.runs import Run
from moe_upgrpo.store.questions import rate
from moe_upgrpo.store.streamed import Counted, Question
from moe_upgrpo.store.token_log import read_tokens
from tests.report.synthetic import make_run, write_tokens

STEPS = 4


@pytest.fixture
def counted(monkeypatch):
    """How often each was asked for in earnest."""
    calls = Counter()

    def count(owner, name, key):
        real = getattr(owner, name)

        def counting(*arguments, **named):
            calls[name, key(*arguments, **named)] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    for name in ("_series", "_pooled_by_layer", "_by_layer"):
        count(Run, name, lambda self, name: name)
    count(Run, "_pooled", lambda self, name, steps: (name, steps and tuple(steps)))
    count(Question, "rows", lambda self: (self.quantity, self.by))
    count(tokens, "read_tokens", lambda file, columns: (file.name, tuple(columns)))
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])
    return calls


def test_nothing_is_computed_twice_and_files_are_read_one_by_one(tmp_path, counted):
    path = make_run(tmp_path / "run", steps=STEPS)
    write_report([path], tmp_path / "report.html")
    kinds = Counter(name for name, _ in counted)
    assert kinds["_series"] > 20 and kinds["_pooled"] > 5 and kinds["rows"] > 30
    assert {key: n for key, n in counted.items() if n > 1} == {}
    read = [key for name, key in counted if name == "read_tokens"]
    # Each file twice, for bins and for sums, and the last one for its sequences.
    assert len(read) == 2 * STEPS + 1


def test_parts_give_what_the_whole_gives(tmp_path):
    """Also where bins and the most frequent tokens need all of them; `rate` has the whole table."""
    path = make_run(tmp_path / "run", steps=STEPS)
    table, log = read_tokens(path), tokens.read_token_log(path)
    asked = [("gap", by) for by in ("all", "position", "prefix", "margin", "token", "own", "step")]
    asked += [("gap", "context"), ("mismatch", "context"), ("clipped", "step")]
    asked += [("mismatch", "layer"), ("clipped", "sign"), ("gradient_weight_negative", "prefix")]
    log.answer_all(asked, summed=True)
    for quantity, by in asked:
        whole, parts = rate(table, quantity, by=by), log.ask(quantity, by)
        assert [row.group for row in whole] == [row["group"] for row in parts]
        for name in ("numerator", "denominator", "rate", "low", "high"):
            one = [getattr(row, name) for row in whole]
            assert np.nan_to_num(one).tolist() == pytest.approx([r[name] or 0.0 for r in parts])
    tokens_M = np.bincount(table["layers_mismatched"].to_numpy())
    assert log.clustered().tokens_M.tolist() == tokens_M.tolist()


def test_flips_above_a_floor_are_summed_by_prompt_over_files(tmp_path):
    """Step 1: prompt 0 on two ranks, 2 − 0 and 1 − 2, prompt 1 on one, 1 − 0. Step 2 has another
    prompt 0, 0 − 1; step 3 was not analysed."""
    floor = "noise_trainer_repeat"
    for step, rank, prompts, differ, own in (
        (1, 0, [0, 1], [2, 1], [0, 0]),
        (1, 1, [0], [1], [2]),
        (2, 0, [0], [0], [1]),
        (3, 0, [0], [2], None),
    ):
        rows = {"sequence": np.arange(len(prompts)) + 2 * rank, "prompt": np.array(prompts)}
        rows["overlap"] = np.where(np.arange(2) < np.array(differ)[:, None], 1, 2)
        rows |= {floor: np.array(own)} if own else {}
        write_tokens(tmp_path, step, rows, 2, rank=rank)
    log = tokens.read_token_log(tmp_path)
    assert log.above_floor(floor, [1]).tolist() == [1, 1]
    assert log.above_floor(floor, [1, 2, 3]).tolist() == [1, 1, -1]
    assert log.above_floor(floor, [3]) is None
    assert log.above_floor("noise_engine_repeat", [1]) is None


def test_bins_end_where_numpy_says():
    values = np.random.default_rng(0).integers(0, 50, 1000)
    counted = Counted()
    for part in np.split(values, 4):
        counted.add(part)
    assert counted.ends(20) == pytest.approx(np.quantile(values, np.arange(1, 20) / 20))
    coarse = Counted()
    floats = values / 7 + 0.01
    coarse.add(floats)
    assert coarse.ends(20) == pytest.approx(np.quantile(floats, np.arange(1, 20) / 20), rel=1e-3)


def test_a_long_curve_keeps_its_spikes_and_its_means():
    values = [0.0] * (MAX_POINTS + 2000)
    values[1234] = 9.0
    found = thinned(list(range(len(values))), values)
    assert len(found["values"]) < 1000 and max(found["values"]) == 9.0
    assert found["steps"][found["values"].index(9.0)] == 1234
    assert np.mean(found["means"]) == pytest.approx(9 / len(values))
    short = [1.0] * MAX_POINTS
    assert thinned(list(range(MAX_POINTS)), short)["values"] == short
