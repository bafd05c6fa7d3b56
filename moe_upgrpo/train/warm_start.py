# SPDX-License-Identifier: Apache-2.0
"""The tiny Qwen3-MoE, and its supervised warm start to a middling accuracy.

RL needs a model that is right sometimes. The warm start makes one from nothing with plain
transformers and PyTorch, and stops at an accuracy, not at a step: the step at which addition is
suddenly learnt depends on the seed.

B problems, S tokens of prompt and solution, padded on the right.
"""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.export import by_umask
from moe_upgrpo.rollout.hf import no_progress_bar
from moe_upgrpo.store.files import write_text
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.tasks.base import Problem
from moe_upgrpo.train.tiny import WarmStartConfig

PROGRESS_EVERY = 50  # steps
IGNORED = -100  # the label of positions that the loss leaves out


def tiny_model_config(
    *,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    experts: int = 8,
    expert_intermediate: int = 64,
    top_k: int = 2,
    max_positions: int = 64,
) -> Qwen3MoeConfig | Qwen3Config:
    """A Qwen3-MoE for the arithmetic vocabulary; the defaults make 1.0M parameters.

    With experts=0 a dense Qwen3 whose MLP is as wide as the top-k experts together: as many active
    parameters. The mismatch between engine and trainer grows with the number of experts: for a
    model that shows the published 10% of routers, take 64 or 128 small experts and top-8.
    """
    if experts and not 1 <= top_k <= experts:
        raise UserError(f"top_k is {top_k}; 1 to {experts} (the number of experts) are allowed.")
    common = dict(
        vocab_size=len(arithmetic.VOCABULARY),
        hidden_size=hidden,
        intermediate_size=expert_intermediate * top_k,  # the MoE model has no such layer
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        # No padding row: transformers would make it exactly 0 and leave it out of every gradient.
        # Sampled responses may hold the token, and the gradient of RMSNorm at 0 is a thousandfold.
        pad_token_id=None,
        eos_token_id=arithmetic.EOS_ID,
        bos_token_id=None,
    )
    if not experts:
        return Qwen3Config(**common)
    return Qwen3MoeConfig(
        **common,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_intermediate,
        norm_topk_prob=top_k > 1,  # else the gate is 1, and no gradient reaches the router
        router_aux_loss_coef=0.0,
    )


def warm_start(
    task: ArithmeticTask,
    model_config: PretrainedConfig,
    *,
    settings: WarmStartConfig,
    cache_dir: str | Path,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Make a warm-started Hugging Face checkpoint with tokenizer, unless it exists.

    Returns its folder, whose name is a hash of everything that determines it: settings, model,
    task, this recipe's code and the versions of torch and transformers. It is complete or absent:
    written elsewhere, then renamed. `warm_start.json` in it says how it was made and the accuracy
    that it reached. `progress` gets a line at the start, and one every 50 steps.

    Raises UserError if `max_steps` do not reach the target.
    """
    recipe = {
        "settings": asdict(settings),
        "model": model_config.to_diff_dict(),
        "task": [type(task).__name__, vars(task).get("digits")],
        "code": [_source_hash(module) for module in (arithmetic, inspect.getmodule(warm_start))],
        "versions": [torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
    folder = Path(cache_dir) / f"warm-start-{digest[:16]}"
    if folder.exists():
        return folder

    progress(
        "warm start: RL needs a model that is right sometimes, so a tiny one is made and taught by "
        f"examples until pass@1 is {settings.target_pass_at_1:g}: {settings.max_steps:,} steps at "
        f"most, some 400 (a minute or two) by default, and only this once; kept in {cache_dir}"
    )
    model, reached = _train(task, model_config, settings, progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with no_progress_bar():
            model.save_pretrained(unfinished)
        arithmetic.save_tokenizer(unfinished)
        made_by = json.dumps(recipe | {"reached": reached}, indent=1, default=str)
        write_text(unfinished / "warm_start.json", made_by + "\n")
        by_umask(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        # Another process may have renamed its own, the same, in the meantime.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _source_hash(module) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def _train(
    task: ArithmeticTask,
    model_config: PretrainedConfig,
    settings: WarmStartConfig,
    progress: Callable[[str], None],
) -> tuple[PreTrainedModel, dict]:
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        # A copy: transformers writes into a model's configuration, and the folder's name depends on
        # it.
        model = AutoModelForCausalLM.from_config(deepcopy(model_config), dtype=torch.float32)
    if model_config.model_type == "qwen3_moe":
        model.set_experts_implementation("grouped_mm")  # the fastest on one CPU thread
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if settings.random_router:
        for name, weight in model.named_parameters():
            weight.requires_grad_(not name.endswith(".mlp.gate.weight"))
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warmup_steps)
    )
    # Step 0 draws the problems of the probe, the steps after it those that are trained on.
    probes = min(settings.probe_problems, task.training_count)
    probe = task.training_problems(probes, seed=settings.seed, step=0)
    for step in range(1, settings.max_steps + 1):
        problems = task.training_problems(settings.batch_size, seed=settings.seed, step=step)
        input_ids, labels = _supervised_batch(task, problems, model.device)
        logits = model(input_ids=input_ids).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        schedule.step()
        report = step % PROGRESS_EVERY == 0
        if report or step % settings.probe_every == 0 or step == settings.max_steps:
            reached = {"step": step, "loss": loss.item()} | expected_accuracy(model, task, probe)
            line = (
                f"warm start: step {step}, loss {loss.item():.3f}, on training problems "
                f"pass@1 {reached['pass@1']:.3f} (aim {settings.target_pass_at_1:g}), "
                f"greedy {reached['greedy']:.3f}"
            )
            if reached["pass@1"] >= settings.target_pass_at_1:
                progress(line)
                return model, reached
        if report:
            progress(line)
    raise UserError(
        f"The warm start did not reach pass@1 {settings.target_pass_at_1} in {settings.max_steps} "
        f"steps (seed {settings.seed}): pass@1 {reached['pass@1']:.3f}, loss {loss.item():.3f}. "
        "Allow more max_steps, take another seed or an easier task."
    )


@torch.no_grad()
def expected_accuracy(
    model: PreTrainedModel, task: ArithmeticTask, problems: Sequence[Problem]
) -> dict[str, float]:
    """Exact accuracies by teacher forcing, without sampling; for tasks with one right response.

    pass@1 = mean over problems of Π_t π(solution_t | prompt, solution_<t) at temperature 1;
    greedy = share of problems for which every solution token has the highest logit.
    """
    input_ids, labels = _supervised_batch(task, problems, model.device)
    logits = model(input_ids=input_ids).logits
    counted_BS = labels != IGNORED
    targets = labels.clamp(min=0)
    logp_BS = logits.log_softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0]
    right_BS = (logits.argmax(dim=-1) == targets) | ~counted_BS
    return {
        "pass@1": (logp_BS * counted_BS).sum(dim=1).exp().mean().item(),
        "greedy": right_BS.all(dim=1).float().mean().item(),
    }


def _supervised_batch(
    task: ArithmeticTask, problems: Sequence[Problem], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels `[B, S]`; the label of a position is the solution token that follows it."""
    rows = [(problem.prompt_ids, task.solution_ids(problem)) for problem in problems]
    width = max(len(prompt) + len(solution) for prompt, solution in rows) - 1
    input_ids = np.full((len(rows), width), arithmetic.PAD_ID)
    labels = np.full((len(rows), width), IGNORED)
    for row, (prompt, solution) in enumerate(rows):
        whole = np.concatenate([prompt, solution])
        input_ids[row, : len(whole) - 1] = whole[:-1]
        labels[row, len(prompt) - 1 : len(whole) - 1] = solution
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device)
