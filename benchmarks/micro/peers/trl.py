"""An RL step by TRL's GRPOTrainer, including its own generation.

torchrun --nproc-per-node N -m benchmarks.micro.peers.trl WORK_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

from benchmarks.micro.peers import Work, write_steps


def run(work: Work, *, rank: int = 0, ranks: int = 1) -> None:
    """Run all steps of one rank; rank 0 writes them."""
    # Read from the environment while TRL is imported.
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    import torch.distributed as dist
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if work.prompts * work.group % (ranks * work.minibatches):
        sys.exit(f"{work.prompts} × {work.group} sequences do not divide over {ranks} ranks.")
    ends: list[tuple[float, float]] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append((time.perf_counter(), time.process_time()))

    def reward(completion_ids, **kwargs):
        tokens.append(sum(map(len, completion_ids)))
        return [float(ids[0] % 2) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sequences = work.prompts * work.group // ranks // work.minibatches
    micro_batch = work.micro_batch or sequences
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": [f"{i:02d}+{i:02d}=" for i in range(99)]}),
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=work.steps * work.minibatches,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=sequences // micro_batch,
                steps_per_generation=work.minibatches * (sequences // micro_batch),
                num_generations=work.group,
                max_completion_length=work.new_tokens,
                beta=0.0,
                num_iterations=1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                learning_rate=1e-4,
                ddp_backend="gloo" if ranks > 1 else None,
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    # An RL step ends with its last optimizer step; the beginning of the first is not known.
    own = ends[work.minibatches - 1 :: work.minibatches]
    everyone = [(own, tokens)]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, (own, tokens))
    steps = [
        (
            sum(sampled[i] for _, sampled in everyone),
            sum(at[i][1] - at[i - 1][1] for at, _ in everyone),
            own[i][0] - own[i - 1][0],
        )
        for i in range(1, work.steps)
    ]
    if rank == 0:
        write_steps(work, steps)


def main() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run(Work(**json.loads(sys.argv[1])), rank=rank, ranks=ranks)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    # What TRL leaves running aborts the interpreter's own end now and then ("terminate called
    # without an active exception"), after all is written.
    os._exit(0)


if __name__ == "__main__":
    main()
