"""TensorBoard and Weights & Biases, the real packages; wandb offline: its server is not tried."""

import importlib.util
import json
import struct
import time

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import RunFolder
from moe_upgrpo.train import tracking
from moe_upgrpo.train.tracking import Tracking, numbers

ROW = {
    "step": 3,
    "reward/mean": np.float32(0.5),
    "tokens/sampled": 12,
    "mismatch/by_layer": [0.25, None, float("nan"), 0.75],
    "time/update": {"a": 1.5},
    "clip/positive": None,
    "loss/policy": float("inf"),
    "alarms": ["entropy"],
}
NUMBERS = {
    "reward/mean": 0.5,
    "tokens/sampled": 12,
    "mismatch/by_layer/0": 0.25,
    "mismatch/by_layer/3": 0.75,
    "time/update/a": 1.5,
}


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "my-run", {"loss": "up-grpo"}).path


def test_the_numbers_of_a_row_are_those_that_are_finite():
    assert dict(numbers({k: v for k, v in ROW.items() if k != "step"})) == NUMBERS


def scalars(run, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(NUMBERS)
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_every_number_and_a_resumed_run_once(run):
    first = Tracking(["tensorboard"], run)
    for step in (1, 2, 3):
        first.log(ROW | {"step": step, "reward/mean": step / 4})
    # Killed: not closed. The checkpoint was of step 2.
    again = Tracking(["tensorboard"], run, done=2)
    again.log(ROW | {"step": 3, "reward/mean": 7.0})
    again.close()
    first.close()
    assert scalars(run, "reward/mean") == [(1, 0.25), (2, 0.5), (3, 7.0)]
    assert scalars(run, "mismatch/by_layer/3")[0] == (1, 0.75)


def records(file) -> list[bytes]:
    """Those of LevelDB's log format: blocks of 32 KiB, each part with checksum, length and type."""
    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            found.append(parts)
            parts = b""
    return found


def wandb_rows(run) -> list[tuple[str, dict]]:
    """(run id, numbers) of every row in the folder's offline files, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                rows.append((file.stem, values))
    return rows


@pytest.fixture
def fresh_wandb():
    """wandb reads the environment once in a process, unless it is torn down."""
    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_has_every_number_and_a_resumed_run_is_the_same_run(run, fresh_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Tracking(["wandb", "tensorboard"], run)
    first.log(ROW)
    first.close()
    time.sleep(1)  # wandb names its folder by the second
    second = Tracking(["wandb"], run, done=3)
    second.log(ROW | {"step": 4})
    second.close()
    wandb.teardown()  # the files are then whole
    rows = wandb_rows(run)
    assert [values["step"] for _, values in rows] == [3, 4]
    assert len({identity for identity, _ in rows}) == 1
    for _, values in rows:
        assert {n: v for n, v in values.items() if n in NUMBERS} == NUMBERS
        assert not set(ROW) - set(NUMBERS) - {"step"} & set(values)
    assert scalars(run, "reward/mean") == [(3, 0.5)]


def test_what_is_not_installed_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    tracking.check(["tensorboard"])
    tracking.check(["none"])
    with pytest.raises(UserError, match=r"wandb is not installed.*moe_upgrpo\[tracking\]"):
        tracking.check(["tensorboard", "wandb"])
    with pytest.raises(UserError, match="none cannot be combined"):
        tracking.check(["none", "tensorboard"])


def test_wandb_without_a_key_says_what_to_do(run, fresh_wandb, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        Tracking(["wandb"], run)
