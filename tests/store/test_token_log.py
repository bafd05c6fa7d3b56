"""The token log: rows come back as written, bad columns and bad files are named."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import TokenLayout, TokenLogWriter, overlap_array, read_tokens

FLOATS = ("reward", "advantage", "logp_rollout", "logp_old", "logp_train", "ratio")


def make_columns(num_rows=6, num_layers=3, top_k=2, seed=0):
    rng = np.random.default_rng(seed)
    overlap = rng.integers(0, top_k + 1, size=(num_rows, num_layers))
    return {
        "sequence": np.arange(num_rows, dtype=np.int64) + 2**40,
        "prompt": np.arange(num_rows) // 2,
        "position": np.arange(num_rows) + 10,
        "token_id": rng.integers(0, 150_000, num_rows),
        **{name: rng.standard_normal(num_rows) for name in FLOATS},
        "clipped": rng.random(num_rows) < 0.5,
        "layers_mismatched": np.array([sum(k < top_k for k in row) for row in overlap.tolist()]),
        "overlap": overlap,
    }


def make_writer(folder, rank=0, num_layers=3, top_k=2, num_experts=8):
    layer_ids = range(1, num_layers + 1)
    return TokenLogWriter(
        folder, rank=rank, layer_ids=layer_ids, top_k=top_k, num_experts=num_experts
    )


def test_rows_come_back_as_written(tmp_path):
    columns = make_columns()
    file = make_writer(tmp_path / "tokens").write(12, columns)
    assert file.name == "step-000012-rank-0000.parquet"
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    table = read_tokens(tmp_path)
    assert table["step"].to_pylist() == [12] * 6
    for name in ("sequence", "prompt", "position", "token_id", "clipped", "layers_mismatched"):
        assert table[name].to_pylist() == columns[name].tolist()
    for name in FLOATS:
        np.testing.assert_array_equal(table[name].to_numpy(), columns[name].astype(np.float32))
    np.testing.assert_array_equal(overlap_array(table), columns["overlap"])
    assert TokenLayout.of(table.schema) == TokenLayout(layer_ids=(1, 2, 3), top_k=2, num_experts=8)


def test_schema_is_what_the_documentation_says(tmp_path):
    """Read with pyarrow alone: types, no nulls, and the metadata that other readers rely on.

    Without optional columns; those are in test_token_log_routes.py.
    """
    schema = pq.read_schema(make_writer(tmp_path).write(1, make_columns()))
    assert not any(field.nullable for field in schema)
    kinds = {field.name: str(field.type) for field in schema}
    assert kinds.pop("overlap").startswith("fixed_size_list<element: uint8 not null>[3]")
    assert kinds == {
        "step": "int32",
        "sequence": "int64",
        "prompt": "int32",
        "position": "int32",
        "token_id": "int32",
        **dict.fromkeys(FLOATS, "float"),
        "clipped": "bool",
        "layers_mismatched": "int16",
    }
    assert json.loads(schema.metadata[b"moe_upgrpo.token_log"]) == {
        "schema_version": 3,
        "level": "full",
        "share": 1.0,
        "num_layers": 3,
        "layer_ids": [1, 2, 3],
        "top_k": 2,
        "num_experts": 8,
    }


def test_dense_model(tmp_path):
    columns = make_columns(num_layers=0)
    writer = make_writer(tmp_path, num_layers=0)
    writer.write(1, columns)
    del columns["overlap"]
    writer.write(2, columns)
    table = read_tokens(tmp_path)
    assert table.num_rows == 12
    assert overlap_array(table).shape == (12, 0)
    assert TokenLayout.of(table.schema).num_layers == 0


def test_ranks_steps_and_columns(tmp_path):
    for step in (2, 10, 1):
        for rank in (1, 0):
            make_writer(tmp_path, rank=rank).write(step, make_columns(2, seed=step * 10 + rank))
    (tmp_path / ".step-000011-rank-0000.parquet.tmp").write_bytes(b"half")
    (tmp_path / "notes.parquet").write_bytes(b"not ours")
    assert read_tokens(tmp_path)["step"].to_pylist() == [1] * 4 + [2] * 4 + [10] * 4
    table = read_tokens(tmp_path, columns=["overlap", "ratio"], steps=[2, 3])
    assert table.column_names == ["overlap", "ratio"]
    ranks = [make_columns(2, seed=20), make_columns(2, seed=21)]
    expected = np.concatenate([columns["overlap"] for columns in ranks])
    np.testing.assert_array_equal(overlap_array(table), expected)
    one_file = read_tokens(tmp_path / "step-000010-rank-0001.parquet")
    assert one_file["ratio"].to_pylist() == make_columns(2, seed=101)["ratio"].astype("f4").tolist()


def test_a_step_is_written_once(tmp_path):
    writer = make_writer(tmp_path)
    writer.write(1, make_columns())
    with pytest.raises(UserError, match=r"step 1 was logged before.*RunFolder\.resume"):
        writer.write(1, make_columns())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": None}, r"missing columns \['ratio'\]"),
        ({"overlap": None}, r"missing columns \['overlap'\]"),
        ({"gap": np.zeros(6)}, r"unknown columns \['gap'\]"),
        ({"ratio": np.zeros(5)}, "different lengths.*'ratio': 5"),
        ({"ratio": np.zeros((6, 1))}, r"ratio must have shape \[6\], got \[6, 1\]"),
        ({"logp_train": np.ma.masked_less(np.zeros(6), 1)}, "column logp_train cannot hold nulls"),
        ({"step": np.full(6, 2)}, "other steps than the 1"),
        ({"ratio": np.zeros(6, int)}, "column ratio must hold float, got int64"),
        ({"clipped": np.zeros(6)}, "column clipped must hold bool, got float64"),
        ({"position": np.zeros(6)}, "column position must hold int32, got float64"),
        ({"token_id": np.full(6, 2**31)}, "column token_id does not fit int32"),
        ({"overlap": np.zeros((6, 2), int)}, r"integers of shape \[6, 3\].*\[6, 2\]"),
        ({"overlap": np.full((6, 3), 3)}, r"must be in 0\.\.2 \(top-k\), got 3\.\.3"),
        ({"overlap": np.full((6, 3), -1)}, r"must be in 0\.\.2 \(top-k\), got -1"),
        ({"overlap": np.zeros((6, 3))}, "got float64"),
        (
            {"overlap": np.full((6, 3), 2), "layers_mismatched": np.array([0, 0, 1, 0, 0, 0])},
            "row 2: layers_mismatched is 1, but overlap is below 2 in 0 layers",
        ),
    ],
)
def test_bad_columns(tmp_path, changes, message):
    columns = {k: v for k, v in (make_columns() | changes).items() if v is not None}
    with pytest.raises(UserError, match=message):
        make_writer(tmp_path).write(1, columns)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        make_writer(tmp_path).write(1, make_columns(0))
    with pytest.raises(UserError, match="holds no token log: expected"):
        read_tokens(tmp_path)
    make_writer(tmp_path).write(1, make_columns())
    with pytest.raises(UserError, match=r"holds no token log of steps \[2\]"):
        read_tokens(tmp_path, steps=[2])


def test_bad_layout(tmp_path):
    with pytest.raises(UserError, match="layer_ids must differ"):
        TokenLogWriter(tmp_path, rank=0, layer_ids=[1, 1], top_k=2, num_experts=8)
    with pytest.raises(UserError, match=r"top_k must be in 1\.\.min"):
        TokenLogWriter(tmp_path, rank=0, layer_ids=[1], top_k=9, num_experts=8)


def write_truncated(file: Path):
    file.write_bytes(file.read_bytes()[:-200])


def write_foreign(file: Path):
    pq.write_table(pa.table({"step": [1]}), file)


def write_next_version(file: Path):
    table = pq.read_table(file)
    about = json.loads(table.schema.metadata[b"moe_upgrpo.token_log"]) | {"schema_version": 4}
    pq.write_table(table.replace_schema_metadata({"moe_upgrpo.token_log": json.dumps(about)}), file)


def write_other_model(file: Path):
    file.unlink()
    make_writer(file.parent, num_layers=2).write(2, make_columns(num_layers=2))


def write_empty(file: Path):
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_truncated, "is truncated or not Parquet"),
        (write_empty, "is truncated or not Parquet"),
        (write_foreign, "not a token log"),
        (write_next_version, "schema version 4 is unknown: this package reads versions 1, 2, 3"),
        (write_other_model, "routes of another model"),
    ],
)
def test_a_bad_file_is_named_and_the_others_stay_readable(tmp_path, spoil, message):
    writer = make_writer(tmp_path)
    for step in (1, 2):
        file = writer.write(step, make_columns())
    spoil(file)
    with pytest.raises(UserError, match=rf"step-000002-rank-0000\.parquet.*{message}"):
        read_tokens(tmp_path)
    assert read_tokens(tmp_path, steps=[1]).num_rows == 6


def test_unknown_column(tmp_path):
    make_writer(tmp_path).write(1, make_columns())
    with pytest.raises(UserError, match=r"no columns \['gap'\]: it has \['step'"):
        read_tokens(tmp_path, columns=["gap"])
