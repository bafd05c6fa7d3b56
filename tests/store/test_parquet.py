"""No bit of a file of ours flips unseen; files of the version before have none of the checksums.

The expected values of the version-2 files lie beside them: what their writer was given.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.cache import load_rollouts, save_rollouts
from moe_upgrpo.store import (
    TokenLayout,
    TokenLogWriter,
    overlap_array,
    read_evaluations,
    read_routes,
    read_tokens,
)
from moe_upgrpo.store.evaluations import write_evaluation
from moe_upgrpo.store.parquet import read_checked, write_checked
from tests.store.rows import EXPERTS, LAYERS, TOP_K, full_columns

VERSION_2 = Path(__file__).parent / "version_2"
EVALUATION = {
    "problem": [0, 1, 2],
    "prompt": ["1+1=", "2+2=", "3+3="],
    "greedy": [True, False, True],
    "samples": [4, 4, 4],
    "correct": [3, 0, 4],
    "majority": [1.0, 0.5, 1.0],
}


def tokens_said(file):
    table = read_tokens(file)
    assert table.num_rows
    return table.to_pydict(), [s.tolist() for s in read_routes(table)], TokenLayout.of(table.schema)


def rollouts_said(file):
    names = ("prompt_ids", "response_ids", "logp_rollout", "routes", "weight_version", "finished")
    kept = load_rollouts(file.parent, 1)
    values = [np.asarray(getattr(rollout, name)) for rollout in kept for name in names]
    return [(value.dtype, value.tolist()) for value in values]


def token_file(folder):
    writer = TokenLogWriter(
        folder, rank=0, layer_ids=range(1, LAYERS + 1), top_k=TOP_K, num_experts=EXPERTS
    )
    return writer.write(1, full_columns(100)), tokens_said


def evaluation_file(folder):
    file = write_evaluation(folder / "evaluations", 1, EVALUATION)
    return file, lambda file: read_evaluations(file.parents[1]).to_pydict()


def rollout_file(folder):
    kept = load_rollouts(VERSION_2 / "rollouts", 1)
    return save_rollouts(folder, 1, 0, kept), rollouts_said


@pytest.mark.parametrize("make", [token_file, evaluation_file, rollout_file])
def test_a_flipped_bit_is_refused_or_changes_nothing(make, tmp_path):
    """300 seeded bits of a file, one at a time, read by the function that users call.

    Without checksums 58% of a token file's read as other values. Some bits say nothing that is
    read, such as statistics and names that stand there twice.
    """
    file, said = make(tmp_path)
    whole, expected = file.read_bytes(), said(file)
    bits = np.random.default_rng(0).choice(8 * len(whole), 300, replace=False).tolist()
    refused, silent = 0, []
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            if said(file) != expected:
                silent.append(bit)
        except UserError as error:
            refused += 1
            assert file.name in str(error) or "holds no evaluation" in str(error)
    assert silent == []
    assert refused > 150


def test_each_bit_of_what_names_the_model_is_held(tmp_path):
    """The metadata stands in a file twice; pyarrow reads now the one, now the other."""
    file, said = token_file(tmp_path)
    whole, expected = file.read_bytes(), said(file)
    places = [i for i in range(len(whole)) if whole.startswith(b'"layer_ids": [1, 2, 3]', i)]
    assert places
    for place in (p for start in places for p in range(start, start + 22)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            with suppress(UserError):
                assert said(file) == expected


def test_pages_have_the_checksums_that_other_readers_know(tmp_path):
    """A byte inside of a page: pyarrow itself refuses it, with nothing of ours."""
    file, _ = token_file(tmp_path)
    column = pq.read_metadata(file).row_group(0).column(0)
    at = column.data_page_offset + column.total_compressed_size - 8
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.ParquetFile(file, page_checksum_verification=True).read()


def test_every_reader_and_writer_of_the_package_takes_these():
    package = Path(__file__).parents[2] / "moe_upgrpo"
    calls = ("write_table(", "read_table(", "ParquetWriter(", "to_parquet(", "read_parquet(")
    found = {
        (file.relative_to(package).as_posix(), line.strip())
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if any(call in line for call in calls) and "`" not in line
    }
    assert found == {("store/parquet.py", "pq.write_table(")}
    opened = [
        (file.name, line.strip())
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if "ParquetFile(" in line
    ]
    assert len(opened) == 2 and all("page_checksum_verification=True" in line for _, line in opened)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3], pa.int32()),
        pa.array([True, False, None]),
        pa.array(["a", "", None, "bcd"]),
        pa.array([b"a", b"", b"bcd"], pa.large_binary()),
        pa.array([b"ab", None, b"cd"], pa.binary(2)),
        pa.array([[1.5, 2.0], [], None, [float("nan")]], pa.list_(pa.float64())),
        pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2)),
        pa.array([], pa.float32()),
        pa.array(["x", "y", "x"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_what_is_written_is_read(column, tmp_path):
    """Slices and several chunks too: a checksum is of the values, not of how they lie."""
    table = pa.table({"a": pa.chunked_array([column, column.slice(1)])})
    write_checked(table, tmp_path / "a.parquet")
    assert read_checked(tmp_path / "a.parquet")["a"].to_pylist() == table["a"].to_pylist() or (
        "double" in str(column.type)
    )


def test_files_of_version_2_are_read(tmp_path):
    given = json.loads((VERSION_2 / "tokens.json").read_text())
    table = read_tokens(VERSION_2)
    assert table["step"].to_pylist() == [1] * 12
    assert TokenLayout.of(table.schema).layer_ids == (1, 2, 3)
    for name, values in given.items():
        if name == "overlap":
            assert overlap_array(table).tolist() == values
        elif "routes" not in name:
            assert table[name].to_pylist() == values, name
    rollout, train = read_routes(table)
    assert (rollout.tolist(), train.tolist()) == (given["rollout_routes"], given["train_routes"])
    found = read_evaluations(VERSION_2).to_pydict()
    assert (found["correct"], found["majority"]) == ([3, 0], [1.0, 0.5])
    kept = load_rollouts(VERSION_2 / "rollouts", 1)
    assert [r.response_ids.tolist() for r in kept] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert kept[1].routes.tolist() == [[[1, 2], [3, 6]]] * 6
    # Beside a file of the current version.
    folder = tmp_path / "tokens"
    shutil.copytree(VERSION_2 / "tokens", folder)
    TokenLogWriter(folder, rank=0, layer_ids=[1, 2, 3], top_k=TOP_K, num_experts=EXPERTS).write(
        2, full_columns()
    )
    assert read_tokens(folder)["step"].to_pylist() == [1] * 12 + [2] * 6
