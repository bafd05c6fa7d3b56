"""A full RL step here against TRL's GRPOTrainer: same model, batch and machine, in turn.

    OMP_NUM_THREADS=1 python benchmarks/micro/trl_step.py [--engine hf] [--prompts 16 32 64] \\
        [--ep 2]

A random Qwen3-MoE of 1.0M parameters; 16, 32 (as `make train`) and 64 prompts × 8 responses of at
most 16 tokens, one optimizer step, fp32, no reference model, rewards at random (what is sampled
does not matter here). TRL: one process, one thread, its own generation. Here: two ranks on two
cores, data-parallel (or expert-parallel, --ep 2), the routes of both sides recorded, compared and
logged, which TRL does not do. Each round runs both, one after the other; of each run the median
over its steps but the first three. Printed: the sampled tokens per second of both, and the median
over the rounds of the ratio of the times per sampled token.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parents[2]
GROUP, NEW_TOKENS, WARM_UP = 8, 16, 3

TRL = """
import json, sys, time
import torch, transformers
torch.set_num_threads(1)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

model, folder, steps, prompts, group, new_tokens = sys.argv[1:3] + list(map(int, sys.argv[3:]))
rows = []

class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()
    def on_step_end(self, args, state, control, **kwargs):
        rows[-1]["seconds"] = time.perf_counter() - self.begin

def reward(completion_ids, **kwargs):
    rows.append({"tokens": sum(map(len, completion_ids))})
    return [float(ids[0] % 2) for ids in completion_ids]

tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    processing_class=tokenizer,
    reward_funcs=reward,
    train_dataset=Dataset.from_dict({"prompt": [f"{i:02d}+{i:02d}=" for i in range(99)]}),
    args=GRPOConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=prompts * group,
        num_generations=group, max_completion_length=new_tokens, beta=0.0, num_iterations=1,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, learning_rate=1e-4,
    ),
    callbacks=[Clock()],
)
trainer.train()
json.dump(rows, open(f"{folder}/rows.json", "w"))
"""


def run(command: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    if result.returncode:
        sys.exit(f"{command[:3]} failed:\n{result.stderr[-3000:]}")


def rate(rows: list[tuple[float, float]]) -> float:
    """Sampled tokens per second of the median step."""
    return statistics.median(tokens / seconds for tokens, seconds in rows[WARM_UP:])


def trl(model: Path, folder: Path, steps: int, prompts: int) -> float:
    folder.mkdir()
    sizes = map(str, (steps, prompts, GROUP, NEW_TOKENS))
    run([sys.executable, "-c", TRL, str(model), str(folder), *sizes])
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return rate([(row["tokens"], row["seconds"]) for row in rows])


def here(model: Path, folder: Path, steps: int, prompts: int, engine: str, ep: int) -> float:
    from moe_upgrpo.store import read_metrics

    run(
        [
            *(str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2"),
            *("examples/train_moe.sh", "--engine", engine, "--engine-dtype", "float32"),
            *("--model", str(model), "--output-dir", str(folder), "--steps", str(steps)),
            *("--tp", "1", "--ep", str(ep), "--prompts", str(prompts), "--group", str(GROUP)),
            *("--minibatches", "1", "--max-new-tokens", str(NEW_TOKENS), "--loss", "grpo"),
            *("--no-reference-kl", "--analyse-every", "0", "--eval-every", str(10 * steps)),
            *("--eval-problems", "2", "--eval-samples", "1"),
        ]
    )
    rows = [row for row in read_metrics(folder) if "time/total" in row]
    return rate([(row["tokens/sampled"], row["time/total"]) for row in rows])


def main(
    engine: Literal["hf", "vllm"] = "vllm",
    prompts: tuple[int, ...] = (16, 32, 64),
    ep: Literal[1, 2] = 1,
    rounds: int = 5,
    steps: int = 15,
) -> None:
    import torch
    from transformers import Qwen3MoeForCausalLM

    from moe_upgrpo.tasks import arithmetic
    from moe_upgrpo.train.warm_start import tiny_model_config

    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(tiny_model_config()).save_pretrained(model)
        arithmetic.save_tokenizer(model)
        for size in prompts:
            ratios = []
            for i in range(rounds):
                theirs = trl(model, Path(scratch) / f"trl-{size}-{i}", steps, size)
                ours = here(model, Path(scratch) / f"here-{size}-{i}", steps, size, engine, ep)
                ratios.append(theirs / ours)
                print(f"TRL {theirs:,.0f} tokens/s, here ({engine}) {ours:,.0f} tokens/s")
            print(
                f"{size} x {GROUP} sequences: time per sampled token, here / TRL: median "
                f"{statistics.median(ratios):.2f} of {rounds} rounds "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
