"""`moe-upgrpo diagnose` with real vLLM in its process and with an SGLang server that it starts."""

import json
import subprocess
import sys

import pytest

from benchmarks.diagnose.engines import saved_model, write_prompts


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_sound_engine_has_no_fault_and_its_precision_is_the_cause(engine, tmp_path):
    sizes = dict(layers=2, hidden=64, experts=16, expert_intermediate=32, top_k=4)
    model = saved_model(tmp_path / "model", **sizes)
    prompts = write_prompts(tmp_path / "prompts.txt", 10)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moe_upgrpo", "diagnose", "--model", str(model)),
            *("--prompts", str(prompts), "--engine", engine, "--output-dir", str(tmp_path / "out")),
            *("--samples", "4", "--max-new-tokens", "24", "--minutes", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert not [one for one in found["findings"] if one["kind"] == "fault"]
    shares = {one["cause"]: one["share"] for one in found["findings"]}
    assert shares["engine-dtype"] > 0.9, shares
    assert f"with engine {engine}, 40 responses" in done.stdout
