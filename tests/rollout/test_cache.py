"""Rollouts come back from their files as they were, and what is no such file is named."""

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.rollout.cache import check_new, drop_after, load_rollouts, save_rollouts
from moe_upgrpo.store.parquet import write_checked


def rollout(prompt: int, response: int, layers: int = 3, top_k: int = 2) -> Rollout:
    rng = np.random.default_rng(prompt * 100 + response)
    return Rollout(
        prompt_ids=rng.integers(0, 1000, prompt),
        response_ids=rng.integers(0, 1000, response),
        logp_rollout=rng.normal(size=response).astype(np.float32),
        routes=rng.integers(0, 300, (prompt + response - 1, layers, top_k)).astype(np.uint16),
        weight_version=7,
        finished=response % 2 == 0,
    )


def same(a: Rollout, b: Rollout) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Rollout))


def test_every_field_comes_back_in_the_order_of_the_ranks(tmp_path):
    by_rank = [[rollout(3, 4), rollout(1, 1)], [rollout(2, 5)]]
    for rank in (1, 0):
        save_rollouts(tmp_path, 12, rank, by_rank[rank])
    found = load_rollouts(tmp_path, 12)
    assert len(found) == 3
    assert all(same(a, b) for a, b in zip(found, [*by_rank[0], *by_rank[1]], strict=True))
    assert found[0].routes.dtype == np.uint16 and not same(found[0], found[1])


def test_a_dense_models_rollouts(tmp_path):
    save_rollouts(tmp_path, 1, 0, [rollout(3, 4, layers=0, top_k=0)])
    assert load_rollouts(tmp_path, 1)[0].routes.shape == (6, 0, 0)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match="no rollouts of step 1"):
        save_rollouts(tmp_path, 1, 0, [])
    with pytest.raises(UserError, match="different kinds"):
        save_rollouts(tmp_path, 1, 0, [rollout(3, 4), rollout(3, 4, layers=2)])
    save_rollouts(tmp_path, 1, 0, [rollout(3, 4)])
    with pytest.raises(UserError, match="exists already"):
        save_rollouts(tmp_path, 1, 0, [rollout(3, 4)])


def test_a_folder_that_is_in_use(tmp_path):
    check_new(tmp_path)
    check_new(tmp_path / "not there yet")
    save_rollouts(tmp_path, 1, 0, [rollout(3, 4)])
    with pytest.raises(UserError, match="holds rollouts already"):
        check_new(tmp_path)


def test_files_that_are_none_of_ours(tmp_path):
    with pytest.raises(UserError, match="no rollouts of step 3"):
        load_rollouts(tmp_path, 3)
    file = save_rollouts(tmp_path, 3, 0, [rollout(3, 4)])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"rank-0000\.parquet is truncated"):
        load_rollouts(tmp_path, 3)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(UserError, match="does not hold rollouts of version 1"):
        load_rollouts(tmp_path, 3)


def test_a_rollout_that_is_short_of_routes_is_named(tmp_path):
    file = save_rollouts(tmp_path, 1, 0, [rollout(3, 4)])
    table = pq.read_table(file)
    cut = pa.array([table["routes"][0].as_py()[:-12]], pa.large_binary())
    write_checked(table.set_column(3, "routes", cut), file)
    with pytest.raises(UserError, match=r"rank-0000\.parquet, row 0: 30 ids of routes; 6 rows"):
        load_rollouts(tmp_path, 1)
    nan = table.set_column(
        2, "logp_rollout", pa.array([[float("nan")] * 4], pa.list_(pa.float32()))
    )
    write_checked(nan, file)
    with pytest.raises(UserError, match=r"row 0: logp_rollout .* is nan"):
        load_rollouts(tmp_path, 1)


def test_only_files_of_ours_are_read_and_dropped(tmp_path):
    """A copy beside a step's file would be trained on twice; what is the user's stays."""
    for step in (1, 2, 1_000_000):
        save_rollouts(tmp_path, step, 0, [rollout(3, 4)])
    theirs = [
        "step-000001-rank-0000 (copy).parquet",
        "step-000001-rank-0000-old.parquet",
        "step-notes.parquet",
        "step-0000002-rank-0000.parquet",
        ".step-mine.tmp",
    ]
    for name in theirs:
        (tmp_path / name).write_bytes((tmp_path / "step-000001-rank-0000.parquet").read_bytes())
    assert [len(load_rollouts(tmp_path, step)) for step in (1, 2, 1_000_000)] == [1, 1, 1]
    (tmp_path / ".step-000002-rank-0000.parquet.tmp").write_bytes(b"half")
    drop_after(tmp_path, 1)
    drop_after(tmp_path / "none was saved yet", 0)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*theirs, "step-000001-rank-0000.parquet"])
