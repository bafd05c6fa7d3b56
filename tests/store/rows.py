"""Rows for tests of the store: routes with mismatches of a known place, and all columns."""

import numpy as np

LAYERS, TOP_K, EXPERTS = 3, 2, 8
FLOATS = ("reward", "advantage", "logp_rollout", "logp_old", "logp_train", "ratio")
GAPS = (
    "gap_numerics",
    "gap_staleness",
    "gap_engine_routing",
    "gap_update",
    "gap_routing_shift",
    "counterfactual_engine_routing",
    "counterfactual_routing_shift",
)
NOISE = tuple(f"noise_{s}_{k}" for s in ("trainer", "engine") for k in ("repeat", "batch_shape"))


def routes(rng, num_rows, num_layers=LAYERS, top_k=TOP_K, num_experts=EXPERTS):
    scores = rng.random((num_rows, num_layers, num_experts))
    return scores.argpartition(top_k, axis=-1)[..., :top_k]


def shared(rollout, train):
    """|S ∩ S'| with Python sets."""
    return np.array(
        [
            [len(set(s) & set(t)) for s, t in zip(*sides, strict=True)]
            for sides in zip(rollout.tolist(), train.tolist(), strict=True)
        ]
    )


def full_columns(num_rows=6, sequences=2, seed=0):
    """Every column that a writer takes; about half of the (token, layer) pairs differ."""
    rng = np.random.default_rng(seed)
    rollout = routes(rng, num_rows)
    other = rng.random((num_rows, LAYERS)) < 0.5
    train = np.where(other[..., None], routes(rng, num_rows), rollout)[..., ::-1]
    overlap = shared(rollout, train)
    return {
        "sequence": np.arange(num_rows) * sequences // num_rows,
        "prompt": np.zeros(num_rows, int),
        "position": np.arange(num_rows) + 10,
        "token_id": rng.integers(0, 100, num_rows),
        **{name: rng.standard_normal(num_rows) for name in FLOATS},
        "clipped": rng.random(num_rows) < 0.5,
        "layers_mismatched": (overlap < TOP_K).sum(axis=1),
        "overlap": overlap,
        "rollout_routes": rollout,
        "train_routes": train,
        "prefix_mismatched": rng.integers(0, 50, num_rows),
        "staleness": rng.integers(0, 2, num_rows),
        "layers_mismatched_conditional": rng.integers(0, LAYERS + 1, num_rows),
        **{name: rng.integers(0, LAYERS + 1, num_rows) for name in NOISE},
        **{name: rng.standard_normal(num_rows) for name in (*GAPS, "margin_min", "entropy")},
        "gradient_weight": rng.random(num_rows),
    }
