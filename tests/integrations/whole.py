"""One check of what every stack's run folder has; the tests of each stack call it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_upgrpo.record.alarms import ALARMS
from moe_upgrpo.store import read_config, read_metrics, read_tokens
from moe_upgrpo.store.texts import read_vocabulary
from moe_upgrpo.tasks.arithmetic import VOCABULARY

# Null in a stack that cannot know it, never invented.
COLUMNS = {"prefix_mismatched", "margin_min", "gradient_weight", "rollout_experts", "train_experts"}
METRICS = {
    "ratio/max",
    "logp_gap/max_abs",
    "logp_gap/k3",
    "tokens/visited",
    "tokens/sampled",
    "mismatch/router_rate",
    "mismatch/zero_rows_by_layer",
    "clip/positive",
    "clip/negative",
}


def assert_whole(run: Path, *, texts: bool = True) -> None:
    """Check the columns, metrics and alarms that all integrations share, by their values.

    texts: whether the stack's model has the tokenizer of conftest.py.
    """
    config, rows = read_config(run), read_metrics(run)
    if texts:
        ids = range(len(VOCABULARY))
        assert read_vocabulary(run, ids) == dict(enumerate(map(str.encode, VOCABULARY)))
    assert config["alarms"] == {name: alarm.means for name, alarm in ALARMS.items()}
    assert {"stack", "model", "layout", "loss", "replay", "engine", "token_log"} <= config.keys()
    assert rows
    for row in rows:
        assert row.keys() >= METRICS, METRICS - row.keys()
        assert set(row["alarms"]) <= ALARMS.keys()
        assert row["tokens/visited"] >= row["tokens/sampled"] > 0
    tokens = read_tokens(run / "tokens")
    assert set(tokens.column_names) >= COLUMNS, COLUMNS - set(tokens.column_names)
    column = {
        name: np.array(tokens[name].to_pylist(), dtype=float)
        for name in ("layers_mismatched", "margin_min", "ratio", "logp_rollout", "logp_old")
    }
    assert np.isfinite(column["margin_min"]).all() and (column["margin_min"] >= 0).all()
    if config["token_log"] == "full":
        step = np.array(tokens["step"].to_pylist())
        for row in rows:
            here = step == row["step"]
            gap = np.abs(column["logp_old"] - column["logp_rollout"])[here]
            np.testing.assert_allclose(row["logp_gap/max_abs"], gap.max(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(row["ratio/max"], column["ratio"][here].max(), rtol=1e-5)
    prefix = tokens["prefix_mismatched"].to_pylist()
    assert any(value is not None for value in prefix)
    assert_prefixes_count(tokens, prefix)


def assert_prefixes_count(tokens, prefix: list) -> None:
    """Check that a token's prefix holds at least the mismatches of the logged tokens before it."""
    names = ("step", "sequence", "position", "layers_mismatched")
    rows = zip(*(tokens[name].to_pylist() for name in names), prefix, strict=True)
    so_far: dict[tuple[int, int], int] = {}
    for step, sequence, _, mismatched, before in sorted(rows, key=lambda row: row[:3]):
        seen = so_far.get((step, sequence), 0)
        assert before is None or before >= seen
        so_far[step, sequence] = seen + mismatched
