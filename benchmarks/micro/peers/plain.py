"""An RL step in plain PyTorch: hardly any framework can be much faster.

transformers' model with its grouped experts, generation that drops finished sequences, forward,
backward, AdamW; data-parallel by one all-reduce. Nothing is recorded.

    torchrun --nproc-per-node N -m benchmarks.micro.peers.plain WORK_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.micro.peers import Work, write_steps

LEARNING_RATE, CLIP_RANGE = 1e-4, 0.2
PROMPT_TOKENS = 6


@torch.inference_mode()
def generate(model: nn.Module, prompts_PW: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Responses_BT and their lengths_B, `group` for each prompt."""
    cache, eos = DynamicCache(config=model.config), model.config.eos_token_id

    def next_logits(ids: Tensor) -> Tensor:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    logits = next_logits(prompts_PW).repeat_interleave(work.group, 0)
    cache.batch_repeat_interleave(work.group)
    sequences = len(logits)
    tokens_BT = torch.zeros(sequences, work.new_tokens, dtype=torch.long)
    length_B = torch.full((sequences,), work.new_tokens)
    alive = torch.arange(sequences)
    for t in range(work.new_tokens):
        token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        tokens_BT[alive, t] = token
        ended = token == eos
        if ended.any():
            length_B[alive[ended]] = t + 1
            goes_on = (~ended).nonzero()[:, 0]
            alive, token = alive[goes_on], token[goes_on]
            if len(goes_on):
                cache.batch_select_indices(goes_on)
        if not len(alive) or t + 1 == work.new_tokens:
            break
        logits = next_logits(token[:, None])
    return tokens_BT, length_B


def log_probs(model: nn.Module, ids_BS: Tensor, width: int, longest: int) -> Tensor:
    """Log-probs of the response tokens, [B, longest]; width: tokens of a prompt."""
    logits = model(input_ids=ids_BS[:, : width + longest - 1]).logits[:, width - 1 :]
    chosen = torch.gather(logits, 2, ids_BS[:, width : width + longest, None])[..., 0]
    return chosen - logits.logsumexp(-1)


def all_reduce_gradients(model: nn.Module, ranks: int) -> None:
    """Average over ranks, in one flat tensor."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    parts = flat.split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def train_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids_BS: Tensor,
    length_B: Tensor,
    advantage_B: Tensor,
    work: Work,
    ranks: int,
) -> None:
    """GRPO's optimizer steps on a batch of prompts and responses."""
    width = ids_BS.shape[1] - work.new_tokens

    def micro_batches(indices: Tensor) -> list[Tensor]:
        if work.sort:
            indices = indices[length_B[indices].argsort()]
        return list(indices.split(work.micro_batch or len(indices)))

    def forward(indices: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(length_B[indices].max())
        counted = torch.arange(longest) < length_B[indices, None]
        return log_probs(model, ids_BS[indices], width, longest), counted.float()

    mini_batches = torch.randperm(len(ids_BS)).chunk(work.minibatches)
    old: dict[int, Tensor] = {}
    if work.minibatches > 1:
        with torch.no_grad():
            for indices in [part for whole in mini_batches for part in micro_batches(whole)]:
                old[int(indices[0])] = forward(indices)[0]
    for whole in mini_batches:
        tokens = length_B[whole].sum()
        for indices in micro_batches(whole):
            now, counted = forward(indices)
            ratio = (now - old.get(int(indices[0]), now.detach())).exp()
            advantage = advantage_B[indices, None]
            clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE) * advantage
            objective = torch.minimum(ratio * advantage, clipped) * counted
            (-objective.sum() / tokens).backward()
        if ranks > 1:
            all_reduce_gradients(model, ranks)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()


def run(work: Work, *, rank: int = 0, ranks: int = 1) -> None:
    """Run all steps of one rank; rank 0 writes them."""
    torch.manual_seed(rank)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
    )
    prompts, steps = work.prompts // ranks, []
    for _ in range(work.steps):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        prompts_PW = torch.randint(2, model.config.vocab_size, (prompts, PROMPT_TOKENS))
        model.eval()
        responses_BT, length_B = generate(model, prompts_PW, work)
        reward_PG = (responses_BT[:, 0] % 2).float().view(prompts, work.group)
        centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
        advantage_B = (centred_PG / (reward_PG.std(1, keepdim=True) + 1e-6)).flatten()
        ids_BS = torch.cat([prompts_PW.repeat_interleave(work.group, 0), responses_BT], 1)
        model.train()
        train_on(model, optimizer, ids_BS, length_B, advantage_B, work, ranks)
        sums = torch.tensor([length_B.sum(), time.process_time() - begin_cpu], dtype=torch.float64)
        if ranks > 1:
            dist.all_reduce(sums)
        steps.append((*sums.tolist(), time.perf_counter() - begin))
    if rank == 0:
        write_steps(work, steps)


def main() -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    run(Work(**json.loads(sys.argv[1])), rank=rank, ranks=ranks)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
