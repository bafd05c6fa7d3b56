"""Write an evidence as a stack leaves it: two dumps, or a run folder with its token log."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_upgrpo.store import RunFolder, TokenLogWriter
from moe_upgrpo.tools.diagnose.evidence import Evidence
from moe_upgrpo.tools.diagnose.matching import overlaps


def write_dumps(folder: Path, evidence: Evidence) -> dict[str, Path]:
    """Write padded batches of both sides' routes and, if kept for responses alone, log-probs."""
    written = {}
    for side in ("rollout_routes", "train_routes"):
        written[side] = folder / f"{side}.npy"
        np.save(written[side], _padded(getattr(evidence, side), 0))
    for side, name in (("logp_rollout", "rollout_logp"), ("logp_train", "train_logp")):
        written[name] = folder / f"{name}.npy"
        np.save(written[name], _padded(getattr(evidence, side), np.nan))
    return written


def _padded(values: list[np.ndarray], filler: float) -> np.ndarray:
    """One array, filled at the end; if sequences have exchanged axes, along the one that varies."""
    shapes = np.array([x.shape for x in values])
    largest = shapes.max(axis=0)
    batch = np.full((len(values), *largest), filler, values[0].dtype)
    for of, x in zip(batch, values, strict=True):
        of[tuple(slice(0, n) for n in x.shape)] = x
    return batch


def write_run(folder: Path, evidence: Evidence, *, routes: bool = True, **config) -> Path:
    """Write a run of one step that kept the response tokens and, on request, their routes."""
    K = evidence.rollout_routes[0].shape[-1]
    run = RunFolder.create(
        folder,
        {
            "loss": "up-grpo",
            "engine": "hf",
            "engine_dtype": "bfloat16",
            "moe_layers": evidence.layer_ids,
            "num_experts": evidence.num_experts,
            "top_k": K,
            "replay": "none",
            "token_log": "full",
        }
        | config,
    )
    columns: dict[str, list[np.ndarray]] = {}
    for i, rows in enumerate(evidence.response):
        for name, values in _sequence(evidence, i, rows).items():
            columns.setdefault(name, []).append(values)
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    if not routes:
        del joined["rollout_routes"], joined["train_routes"]
    writer = TokenLogWriter(
        run.tokens, rank=0, layer_ids=evidence.layer_ids, top_k=K, num_experts=evidence.num_experts
    )
    writer.write(1, joined)
    run.append_metrics({"step": 1, "mismatch/router_rate": float((joined["overlap"] < K).mean())})
    return run.path


def _sequence(evidence: Evidence, i: int, rows: slice) -> dict[str, np.ndarray]:
    rollout, train = (x[i][rows] for x in (evidence.rollout_routes, evidence.train_routes))
    T, K = len(rollout), rollout.shape[-1]
    overlap = np.rint(overlaps(rollout, train) * K).astype(np.uint8)
    zeros = np.zeros(T)
    found = {
        "sequence": np.full(T, i),
        "prompt": np.full(T, evidence.prompt[i]),
        "position": np.arange(T) + rows.start + 1,
        "token_id": evidence.tokens[i][rows.start + 1 : rows.start + 1 + T],
        "reward": zeros,
        "advantage": zeros,
        "logp_rollout": evidence.logp_rollout[i],
        "logp_old": evidence.logp_train[i],
        "logp_train": evidence.logp_train[i],
        "ratio": np.ones(T),
        "clipped": np.zeros(T, bool),
        "gradient_weight": zeros,
        "layers_mismatched": (overlap < K).sum(axis=1),
        "overlap": overlap,
        "rollout_routes": rollout,
        "train_routes": train,
    }
    if evidence.margins is not None:
        found["margin_min"] = evidence.margins[i][rows].min(axis=1)
    for name, values in evidence.columns.items():
        found[name] = values[i].astype(np.int32) if name == "staleness" else values[i]
    return found
