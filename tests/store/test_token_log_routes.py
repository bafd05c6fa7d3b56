"""The token log's optional columns, its levels, and files of the first schema version."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import (
    COLUMNS,
    TokenLayout,
    TokenLogWriter,
    overlap_array,
    read_routes,
    read_tokens,
)
from moe_upgrpo.store.parquet import write_checked
from tests.store.rows import EXPERTS, GAPS, LAYERS, TOP_K, full_columns, routes, shared

OPTIONAL_FLOATS = (*GAPS, "margin_min", "entropy", "gradient_weight")
KEY = b"moe_upgrpo.token_log"


def writer(folder, **options):
    return TokenLogWriter(
        folder, rank=0, layer_ids=range(LAYERS), top_k=TOP_K, num_experts=EXPERTS, **options
    )


def without(columns, *names):
    return {name: values for name, values in columns.items() if name not in names}


def test_every_column_comes_back(tmp_path):
    columns = full_columns(40)
    file = writer(tmp_path).write(1, columns)
    table = read_tokens(tmp_path)
    assert table.column_names == list(COLUMNS)
    for name in ("prefix_mismatched", "layers_mismatched_conditional", "staleness"):
        assert table[name].to_pylist() == columns[name].tolist()
    for name in OPTIONAL_FLOATS:
        np.testing.assert_array_equal(table[name].to_numpy(), columns[name].astype("f4"))
    rollout, train = read_routes(table)
    assert rollout.dtype == train.dtype == np.uint8
    np.testing.assert_array_equal(rollout, np.sort(columns["rollout_routes"]))
    np.testing.assert_array_equal(train, np.sort(columns["train_routes"]))
    np.testing.assert_array_equal(shared(rollout, train), overlap_array(table))
    # C(8, 2) = 28 sets need 5 bits, three layers 15 bits: 2 bytes.
    kinds = {field.name: field.type for field in pq.read_schema(file)}
    assert kinds["rollout_experts"] == pa.binary(2)
    assert kinds["train_experts"] == pa.large_binary()
    assert kinds["prefix_mismatched"] == pa.int32()
    assert kinds["layers_mismatched_conditional"] == pa.int16()
    assert {kinds[name] for name in OPTIONAL_FLOATS} == {pa.float32()}


def test_routes_of_filtered_and_pooled_rows(tmp_path):
    """Slices, filters and several files: offsets of Arrow's buffers do not begin at 0."""
    steps = {step: full_columns(10, seed=step) for step in (1, 2)}
    for step, columns in steps.items():
        writer(tmp_path).write(step, columns)
    table = read_tokens(tmp_path)
    expected = np.sort(np.concatenate([steps[s]["train_routes"] for s in (1, 2)]))
    np.testing.assert_array_equal(read_routes(table)[1], expected)
    np.testing.assert_array_equal(read_routes(table.slice(3, 12))[1], expected[3:15])
    np.testing.assert_array_equal(read_routes(table.slice(14))[1], expected[14:])
    odd = table.filter(pa.array(np.arange(20) % 2 == 1))
    np.testing.assert_array_equal(read_routes(odd)[1], expected[1::2])


def test_steps_with_and_without_optional_columns(tmp_path):
    """The decomposition is made on some steps only: the others have nulls, not zeros."""
    writer(tmp_path).write(1, without(full_columns(), *GAPS, "rollout_routes", "train_routes"))
    writer(tmp_path).write(2, full_columns())
    table = read_tokens(tmp_path)
    assert table.column_names == list(COLUMNS)
    assert table["gap_update"].null_count == 6
    assert table["gap_update"].to_pylist()[:6] == [None] * 6
    assert read_tokens(tmp_path, columns=["gap_update", "step"])["gap_update"].null_count == 6
    alone = read_tokens(tmp_path, columns=["gap_update"])
    assert (alone.num_rows, alone["gap_update"].null_count) == (12, 6)
    with pytest.raises(UserError, match=r"no columns \['gap_update'\]: it has \['step', 'seq"):
        read_tokens(tmp_path, columns=["gap_update"], steps=[1])
    with pytest.raises(UserError, match=r"6 of 12 rows have no rollout_experts, in steps \[1\]"):
        read_routes(table)
    assert read_routes(read_tokens(tmp_path, steps=[2]))[0].shape == (6, LAYERS, TOP_K)
    with pytest.raises(UserError, match=r"no columns \['rollout_experts', 'train_experts'\]"):
        read_routes(read_tokens(tmp_path, steps=[1]))


def test_masked_entries_are_nulls_and_nan_stays_nan(tmp_path):
    """Null: not measured. NaN: measured, and gone wrong."""
    gap = np.ma.masked_array([1.0, np.nan, 3, 4, 5, 6], mask=[0, 0, 1, 0, 0, 0])
    writer(tmp_path).write(1, full_columns() | {"gap_update": gap})
    one, nan, null, *_ = read_tokens(tmp_path)["gap_update"].to_pylist()
    assert one == 1 and np.isnan(nan) and null is None


def test_rollout_routes_alone(tmp_path):
    writer(tmp_path).write(1, without(full_columns(), "train_routes"))
    assert "rollout_experts" in read_tokens(tmp_path).column_names
    with pytest.raises(UserError, match="give both, or neither"):
        writer(tmp_path).write(2, without(full_columns(), "rollout_routes"))


def test_files_of_version_1(tmp_path):
    """As the first version wrote them: other metadata, no optional column; beside version 2."""
    optional = [name for name, column in COLUMNS.items() if column.optional]
    file = writer(tmp_path).write(
        1, without(full_columns(), *optional, "rollout_routes", "train_routes")
    )
    table = pq.read_table(file)
    about = {
        "schema_version": 1,
        "num_layers": LAYERS,
        "layer_ids": [0, 1, 2],
        "top_k": TOP_K,
        "num_experts": EXPERTS,
    }
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(about)}), file)
    alone = read_tokens(tmp_path)
    assert alone.column_names == [name for name in COLUMNS if name not in optional]
    assert TokenLayout.of(alone.schema).top_k == TOP_K
    writer(tmp_path).write(2, full_columns())
    both = read_tokens(tmp_path)
    assert both["step"].to_pylist() == [1] * 6 + [2] * 6
    assert both["entropy"].null_count == 6


def test_a_planted_shift_of_the_row_join_is_refused(tmp_path):
    """Routes of row p in place of p − 1 no longer have the overlap that was computed."""
    columns = full_columns(20)
    columns["train_routes"] = np.roll(columns["train_routes"], 1, axis=0)
    message = r"step 1, sequence \d, position \d+, MoE layer \d: overlap is \d, but the routes"
    with pytest.raises(UserError, match=message):
        writer(tmp_path).write(1, columns)
    assert list(tmp_path.iterdir()) == []


def spoiled(name, row, layer, values):
    columns = full_columns()
    columns[name] = columns[name].copy()
    columns[name][row, layer] = values
    return columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            spoiled("rollout_routes", 4, 2, [0, 8]),
            r"step 1, sequence 1 .*token 1, MoE layer 2: experts \[0, 8\]: expected ids in 0\.\.7",
        ),
        (spoiled("rollout_routes", 0, 1, [3, 3]), r"sequence 0 .*token 0, MoE layer 1.*twice"),
        (spoiled("train_routes", 5, 0, [-1, 3]), r"sequence 1 .*token 2, MoE layer 0.*0\.\.7"),
        (
            spoiled("rollout_routes", slice(None), slice(None), 0),
            r"sequence 0 .*expected 2 different experts, got one twice",
        ),
        (
            full_columns() | {"rollout_routes": np.zeros((6, 2, 2), int)},
            r"rollout_routes must have shape \[6, 3, 2\], got \[6, 2, 2\]",
        ),
        (full_columns() | {"rollout_routes": np.zeros((6, 3, 2))}, "must be integers"),
        (full_columns() | {"prefix_mismatched": np.zeros(6)}, "must hold int32, got float64"),
        (full_columns() | {"rollout_experts": np.zeros(6, int)}, "unknown columns"),
    ],
)
def test_bad_routes_name_the_sequence_and_the_layer(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        writer(tmp_path).write(1, columns)
    assert list(tmp_path.iterdir()) == []


def rewrite(file, name, array):
    table = pq.read_table(file)
    place = table.column_names.index(name)
    table = table.set_column(place, pa.field(name, array.type, nullable=True), array)
    write_checked(table, file)


def test_malformed_route_columns(tmp_path):
    """Types are refused at reading, bytes when unpacked; the other step stays readable."""
    for step in (1, 2):
        file = writer(tmp_path).write(step, full_columns())
    good = pq.read_table(file)

    rewrite(file, "train_experts", pa.array(["x"] * 6))
    with pytest.raises(UserError, match=r"step-000002-.*train_experts is string, expected large_b"):
        read_tokens(tmp_path)
    write_checked(good, file)

    rewrite(file, "rollout_experts", pa.array([b"abc"] * 6, pa.binary(3)))
    table = read_tokens(tmp_path, steps=[2])
    message = r"step 2, sequence 0 .*uint8 of shape \[tokens, 2\].*truncated, or of another model"
    with pytest.raises(UserError, match=message):
        read_routes(table)
    write_checked(good, file)

    # Rows 3..5 are sequence 1. Bits 11111 = 31 number no pair of 8 experts: there are 28.
    packed = good["rollout_experts"].to_pylist()
    rewrite(file, "rollout_experts", pa.array([*packed[:4], b"\xff\xfe", packed[5]], pa.binary(2)))
    with pytest.raises(UserError, match=r"step 2, sequence 1 .*token 1, MoE layer 0: not the num"):
        read_routes(read_tokens(tmp_path))
    write_checked(good, file)

    difference = [value + b"\x01" for value in good["train_experts"].to_pylist()]
    rewrite(file, "train_experts", pa.array(difference, pa.large_binary()))
    with pytest.raises(UserError, match=r"step 2, sequence 0 .*token 0"):
        read_routes(read_tokens(tmp_path))
    assert len(read_routes(read_tokens(tmp_path, steps=[1]))[0]) == 6


def test_a_missing_column_is_named(tmp_path):
    file = writer(tmp_path).write(1, full_columns())
    write_checked(pq.read_table(file).drop_columns(["ratio"]), file)
    with pytest.raises(UserError, match="it lacks the column ratio, float"):
        read_tokens(tmp_path)


def many_sequences(num_sequences=400, tokens=3):
    columns = full_columns(num_sequences * tokens)
    return columns | {"sequence": np.repeat(np.arange(num_sequences), tokens)}


def test_a_sample_keeps_whole_sequences(tmp_path):
    """400 sequences at a share of 0.25: 100 ± 8.7, so 60..140 but for one chance in 200,000."""
    kept = {}
    for share in (0.25, 0.5):
        folder = tmp_path / str(share)
        for step in (1, 2):
            writer(folder, level="sampled", share=share).write(step, many_sequences())
        table = read_tokens(folder)
        about = json.loads(table.schema.metadata[KEY])
        assert (about["level"], about["share"]) == ("sampled", share)
        keys = list(zip(table["step"].to_pylist(), table["sequence"].to_pylist(), strict=True))
        assert len(keys) == 3 * len(set(keys))
        kept[share] = set(keys)
    by_step = [{q for step, q in kept[0.25] if step == s} for s in (1, 2)]
    assert all(60 <= len(sequences) <= 140 for sequences in by_step)
    assert by_step[0] != by_step[1]
    assert kept[0.25] < kept[0.5]


def test_the_sample_does_not_depend_on_the_rank_or_the_order(tmp_path):
    """Rows keep their content: each row kept is the same as in the full log."""
    columns = many_sequences()
    writer(tmp_path / "full").write(1, columns)
    full = read_tokens(tmp_path / "full")
    reverse = {name: values[::-1] for name, values in columns.items()}
    writer(tmp_path / "some", level="sampled", share=0.3).write(1, reverse)
    some = read_tokens(tmp_path / "some")
    chosen = pa.array(np.isin(full["sequence"].to_numpy(), some["sequence"].to_numpy()))
    expected = full.filter(chosen).sort_by("position")
    assert some.sort_by("position").to_pydict() == expected.to_pydict()
    assert some.num_rows < full.num_rows


def test_a_step_may_keep_nothing(tmp_path):
    log = writer(tmp_path, level="sampled", share=1e-9)
    assert log.write(1, full_columns()) is None
    with pytest.raises(UserError, match="level sampled none of some steps"):
        read_tokens(tmp_path)


def test_aggregate_keeps_no_rows_and_still_refuses_bad_ones(tmp_path):
    log = writer(tmp_path, level="aggregate")
    assert log.write(1, full_columns()) is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"missing columns \['ratio'\]"):
        log.write(2, without(full_columns(), "ratio"))


@pytest.mark.parametrize(
    "options",
    [
        {"level": "some"},
        {"level": "sampled"},
        {"level": "full", "share": 0.5},
        {"level": "sampled", "share": 0},
        {"level": "sampled", "share": 1.5},
    ],
)
def test_bad_levels(tmp_path, options):
    with pytest.raises(UserError, match="level"):
        writer(tmp_path, **options)


def test_shares_are_not_pooled(tmp_path):
    writer(tmp_path).write(1, full_columns())
    writer(tmp_path, level="sampled", share=0.999).write(2, full_columns())
    with pytest.raises(UserError, match=r"share of 0\.999 of the sequences, but .* with 1\.0"):
        read_tokens(tmp_path)


def test_bytes_of_a_large_model(tmp_path):
    """48 layers, top-8 of 128, each pair mismatched in one expert with probability 0.1.

    Both route columns as they lie in the file: at most 300 bytes per token, against 2 × 1,536 in
    int32. This is the easy mismatch, one expert exchanged and pairs independent.
    """
    rng = np.random.default_rng(0)
    L, K, E, N = 48, 8, 128, 2000
    ranked = rng.random((N, L, E)).argpartition(K + 1, axis=-1)[..., : K + 1].astype(np.int32)
    rollout, train = ranked[..., :K], ranked[..., :K].copy()
    other = rng.random((N, L)) < 0.1
    train[..., 0] = np.where(other, ranked[..., K], train[..., 0])
    columns = full_columns(N) | {
        "overlap": np.where(other, K - 1, K),
        "layers_mismatched": other.sum(axis=1),
        "rollout_routes": rollout,
        "train_routes": train,
    }
    log = TokenLogWriter(tmp_path, rank=0, layer_ids=range(L), top_k=K, num_experts=E)
    about = pq.read_metadata(log.write(1, columns)).row_group(0)
    sizes = {
        chunk.path_in_schema: chunk.total_compressed_size
        for chunk in map(about.column, range(about.num_columns))
    }
    per_token = (sizes["rollout_experts"] + sizes["train_experts"]) / N
    assert 246 < per_token <= 300
    back = read_routes(read_tokens(tmp_path))
    np.testing.assert_array_equal(back[0], np.sort(rollout))
    np.testing.assert_array_equal(back[1], np.sort(train))


def test_the_generator_makes_sets():
    rows = routes(np.random.default_rng(0), 50)
    assert all(len(set(row)) == TOP_K for token in rows.tolist() for row in token)
