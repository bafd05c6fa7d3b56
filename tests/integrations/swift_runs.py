"""Runs of ms-swift's real trainer: their sequences and flags, and what their token log has to be.

What is ms-swift's in them and what is not: `swift_ranks`.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens
from tests.integrations import swift_ranks
from tests.integrations.places import SWIFT_WHEELS
from tests.ranks import exit_status

L, K, E = 2, 2, 8
CHANGED = ((0, 3, 0), (2, 4, 1), (9, 3, 0), (14, 5, 1), (15, 4, 0))  # sequence, route row, layer
TRAIN = {"micro_batch_size": 2, "global_batch_size": 8, "num_generations": 4,
         "steps_per_generation": 2, "generation_batch_size": 16, "lr": 1e-2, "min_lr": 0.0,
         "lr_warmup_iters": 0, "lr_decay_iters": 10, "train_iters": 10, "bf16": False,
         "fp16": False, "torch_dtype": torch.float32, "padding_free": True, "temperature": 1.0,
         "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
         "expert_model_parallel_size": 1, "context_parallel_size": 1,
         "seq_length": 32}  # fmt: skip
JOBS = {  # name -> ranks, flags
    "observe": (1, {"loss_type": "moe_upgrpo/up-grpo"}),
    "padded": (2, {"padding_free": False, "loss_type": "dapo", "delta": 3.0, "beta": 0.04}),
    "R2": (2, {"router_replay_mode": "R2", "loss_type": "moe_upgrpo/grpo",
               "pipeline_model_parallel_size": 2}),
    "R3": (2, {"router_replay_mode": "R3", "loss_type": "moe_upgrpo/up-grpo",
               "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2,
               "sequence_parallel": True}),
    "CP": (2, {"router_replay_mode": "R3", "loss_type": "moe_upgrpo/up-grpo",
               "context_parallel_size": 2}),
    "CP, padded": (2, {"padding_free": False, "loss_type": "moe_upgrpo/up-grpo",
                       "context_parallel_size": 2}),
    "no log": (1, {"router_replay_mode": "R3", "loss_type": "moe_upgrpo/up-grpo", "lr": 0.0}),
}  # fmt: skip

SHARDS = [(True, "zigzag"), (False, "zigzag"), (True, "contiguous")]  # packed, split


def generated(checkpoint) -> list[dict]:
    """Four prompts of four sequences, with the experts that transformers chooses, some changed."""
    generator = np.random.default_rng(0)
    hf = Qwen3MoeForCausalLM.from_pretrained(checkpoint)
    found = []
    for i in range(16):
        if i % 4 == 0:
            prompt = generator.integers(2, 64, size=2 + i // 4).tolist()
        response = generator.integers(2, 64, size=4 + i % 4).tolist()
        with torch.no_grad():
            out = hf(torch.tensor([prompt + response]), output_router_logits=True)
        routes = torch.stack([x.topk(K).indices for x in out.router_logits], dim=1)[:-1].numpy()
        logps_TV = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own_logp = logps_TV[range(len(response)), response].double().numpy()
        for sequence, row, layer in CHANGED:
            if sequence == i:
                used = routes[row, layer].tolist()
                routes[row, layer] = [e for e in range(E) if e not in used][:K]
        # one token that is not the model's own, such as a tool's
        mask = [int(not (i == 3 and t == 1)) for t in range(len(response))]
        at = np.flatnonzero(mask)
        logp = (-generator.random(sum(mask)) - 3).round(3).tolist()
        found.append(
            {"prompt": prompt, "response": response, "mask": mask, "routes": routes,
             "logp": own_logp[at], "logp_rollout": logp, "reward": float(i % 2),
             "truncated": i == 5}
        )  # fmt: skip
    return found


def run(jobs: dict, folder: Path) -> dict:
    assert SWIFT_WHEELS.is_dir(), f"no {SWIFT_WHEELS}: make test makes it"
    (folder / "jobs.pkl").write_bytes(pickle.dumps(jobs))
    status = exit_status(swift_ranks.main, str(folder), timeout_s=400)
    said = folder / "error.txt"
    assert status == 0, said.read_text()[-4000:] if said.exists() else status
    return pickle.loads((folder / "results.pkl").read_bytes())


def training(checkpoint, folder: Path, names) -> dict:
    data = generated(checkpoint)
    return {
        name: (
            JOBS[name][0],
            swift_ranks.train,
            str(checkpoint),
            None if name == "no log" else str(folder / name),
            data,
            2 if name == "observe" else 1,
            TRAIN | {"output_dir": str(folder)} | JOBS[name][1],
        )
        for name in names
    }


def rows_of(data) -> list[tuple[int, int]]:
    """(sequence, position) of every response token that counts."""
    return [
        (i, len(s["prompt"]) + t) for i, s in enumerate(data) for t, m in enumerate(s["mask"]) if m
    ]


def columns(table) -> dict[str, np.ndarray]:
    names = [name for name in table.column_names if "experts" not in name]
    return {name: np.array(table[name].to_pylist()) for name in names}


def assert_is_of(folder: Path, reported: list, data: list[dict], flags: dict) -> None:
    """Check the first step of a run against the sequences that were given and transformers."""
    table = read_tokens(folder / "tokens")
    table = table.sort_by([(n, "ascending") for n in ("step", "sequence", "position")])
    table = table.slice(0, len(rows_of(data)))
    column, expected = columns(table), rows_of(data)
    assert list(zip(column["sequence"], column["position"], strict=True)) == expected
    rollout, train = read_routes(table)
    given = np.array([data[i]["routes"][p - 1] for i, p in expected])
    assert np.array_equal(np.sort(rollout, -1), np.sort(given, -1))
    of = [data[i] for i, _ in expected]
    ids = [(s["prompt"] + s["response"])[p] for s, (_, p) in zip(of, expected, strict=True)]
    assert column["token_id"].tolist() == ids
    logp = np.concatenate([s["logp_rollout"] for s in data])
    np.testing.assert_allclose(column["logp_rollout"], logp, rtol=1e-6)
    # At the old weights without replay: transformers'. R3's own differ by its routes.
    native = column["logp_old"] + column.get("counterfactual_engine_routing", 0)
    np.testing.assert_allclose(native, np.concatenate([s["logp"] for s in data]), atol=2e-5)
    assert column["reward"].tolist() == [2 * s["reward"] for s in of]  # its weight is 2
    assert column["prompt"].tolist() == [i // 4 for i, _ in expected]
    assert (column["staleness"] == 0).all()
    sign = np.array([1 if s["reward"] else -1 for s in of])
    # Of two rewards twice, normalised by their group: ±1/√(4/3)
    np.testing.assert_allclose(column["advantage"], sign * 0.75**0.5, rtol=1e-3)

    # The native routes are those of transformers in fp32 but where they were changed.
    shared = np.array([[len({*a} & {*b}) for a, b in zip(r, t, strict=True)]
                       for r, t in zip(rollout.tolist(), train.tolist(), strict=True)])  # fmt: skip
    changed = {(i, row + 1, layer) for i, row, layer in CHANGED}
    is_changed = np.array([[(i, p, m) in changed for m in range(L)] for i, p in expected])
    assert is_changed.sum() == len(CHANGED)
    assert (shared[is_changed] == 0).all() and (shared[~is_changed] == K).all()
    assert np.array_equal(column["overlap"], shared)

    row, *_ = read_metrics(folder)
    assert row["mismatch/router_numerator"] == len(CHANGED)
    assert row["mismatch/router_denominator"] == 2 * len(expected)
    assert row["reward/mean"] == 1.0
    assert row["response/finished_rate"] == 15 / 16
    first, last = reported[:2]
    assert len(first) == len(last) == 4 // flags.get("dp", 1)  # micro-batches of two
    assert not [name for name in first[0] if name.startswith("mismatch/")]
    assert all(m["mismatch/router_numerator"] == len(CHANGED) for m in last)
    # ms-swift's own means over the micro-batches
    assert last[0]["logged"]["mismatch/router_numerator"] == len(CHANGED)
    if flags["loss_type"].startswith("moe_upgrpo/"):
        above, below = np.sum([m["moe_upgrpo/ppo_kl"] for m in last], axis=0)
        assert last[0]["logged"]["moe_upgrpo/ppo_kl"] == pytest.approx(above / below, abs=1e-7)
    figures = [[n for n in m if n.startswith("replay/")] for m in (first[0], last[0])]
    assert not figures[0] and bool(figures[1]) == ("router_replay_mode" in flags)

    # Sequences of the first optimizer step are visited at the old weights.
    per_rank = len(data) // flags.get("dp", 1)
    early = column["sequence"] % per_rank < per_rank // 2
    moved = np.abs(column["ratio"] - 1) > 1e-5
    assert not moved[early].any() and moved[~early].mean() > 0.9

    # From the log's own ratios by the formulas of PPO and UP, each token's weight being 1/N.
    r, a = column["ratio"], column["advantage"]
    cut = (a < 0) & ((r < 0.8) | (r > 3)) | (a > 0) & (r > 1.2)
    weight = np.where(cut, 0, np.abs(a) * r)
    if flags["loss_type"] == "moe_upgrpo/up-grpo":
        cut, weight = cut & (a < 0), np.where(a > 0, a, weight)
    assert np.array_equal(column["clipped"], cut) and 0 < cut.sum() < len(cut)
    tokens = np.where(early, early.sum(), (~early).sum())
    np.testing.assert_allclose(column["gradient_weight"], weight / tokens, rtol=1e-3, atol=1e-7)
    config = read_config(folder)
    mode = flags.get("router_replay_mode", "none")
    assert (config["stack"], config["loss"]) == ("ms-swift 4.6.0", flags["loss_type"])
    assert config["replay"] == mode
