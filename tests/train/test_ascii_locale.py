"""Where the locale is plain ASCII: texts of others are read and kept whole, a terminal that cannot
show a sign gets a "?" for it, and nothing fails."""

import json
import os
import subprocess
import sys

import torch
import yaml
from transformers import AutoConfig, Qwen3MoeForCausalLM

from moe_upgrpo.store import read_config, read_evaluations, read_metrics
from tests.tasks.words import TEMPLATE, save_words

# PYTHONUTF8 and PYTHONCOERCECLOCALE: else Python takes C for UTF-8, as no other locale.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
}


def train(*words) -> subprocess.CompletedProcess:
    """In an interpreter of its own, whose locale is that of its start; output as bytes."""
    command = [sys.executable, "-m", "moe_upgrpo", "train", *map(str, words)]
    environment = os.environ | ASCII
    environment.pop("PYTHONIOENCODING", None)
    return subprocess.run(command, capture_output=True, env=environment, timeout=120)


def test_a_run_with_its_report(tmp_path):
    model = save_words(tmp_path / "model", template="{# größer #}" + TEMPLATE, **SIZES)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(AutoConfig.from_pretrained(model)).save_pretrained(model)
    rows = [{"prompt": f"Wie groß ist {i}+1? ½", "answer": str(i + 1)} for i in range(4)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "fragen.jsonl").write_text(lines, encoding="utf-8")
    given = {"instruction": "Antworte für Schüler.", "steps": 1, "prompts": 2, "group": 2}
    given |= {"minibatches": 1, "max_new_tokens": 4, "save_every": 0, "model": str(model)}
    given |= {name: [str(tmp_path / "fragen.jsonl")] for name in ("data", "eval_data")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    folder = tmp_path / os.fsdecode("Läufe".encode())  # as the locale has it

    result = train("--config", config, "--output-dir", folder)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    said = result.stdout.decode("ascii")
    assert "TP1?EP1" in said and "held-out" in said and "L??ufe" in said  # two bytes, two signs
    assert [row["step"] for row in read_metrics(folder)] == [0, 1]
    assert read_config(folder)["instruction"] == "Antworte für Schüler."
    evaluated = read_evaluations(folder).to_pylist()
    assert any("Wie groß ist 0+1? ½" in row["prompt"] for row in evaluated)
    assert "TP1·EP1" in (folder / "report.html").read_text(encoding="utf-8")

    again = train("--config", config, "--output-dir", folder)
    assert again.returncode == 2
    message = again.stderr.decode("ascii")
    assert message.splitlines()[-1].startswith("error: ") and "already holds a run" in message
