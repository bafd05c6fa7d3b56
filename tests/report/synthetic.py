"""Run folders with made-up but plausible metrics, for tests and for looking at the page."""

from pathlib import Path

import numpy as np

from moe_upgrpo.stats import QUANTILES
from moe_upgrpo.store import RunFolder, TokenLogWriter

ALARM = "mismatch-above-noise"
# Rates of the planted noise floors, by their kind, the same at each analysed step.
FLOORS = {
    "trainer_repeat": 0.0,
    "trainer_batch_shape": 0.004,
    "engine_repeat": 0.001,
    "engine_batch_shape": 0.006,
}
# Shares of the planted decomposition in the mean |gap|; which terms the loss sees, under a replay.
TERMS = {"numerics": 0.5, "engine_routing": 0.9, "update": 0.3, "routing_shift": 0.1}
UNSEEN = {"R2": ("routing_shift",), "R3": ("engine_routing",)}


def make_run(
    path: Path,
    *,
    loss: str = "up-grpo",
    steps: int = 60,
    layers: int = 4,
    seed: int = 0,
    k: int = 8,
    level: str = "full",
    share: float = 1.0,
    replay: str = "none",
    sequences: int = 8,
    length: int = 6,
) -> Path:
    """A run that learns; its mismatch grows with depth and time; analysed at steps 1, 10, 20, …"""
    rng = np.random.default_rng(seed)
    run = RunFolder.create(
        path,
        {
            "loss": loss,
            "steps": steps,
            "seed": seed,
            "model": "runs/cache/qwen3-moe-0123456789abcdef",
            "parameters": 1_050_000,
            "layout": "tp2 ep2 dp1",
            "world_size": 2,
            "engine": "hf",
            "engine_dtype": "bfloat16",
            "moe_layers": list(range(1, layers + 1)),
            "num_experts": 8,
            "top_k": 2,
            "replay": replay,
            "token_log": level,
            "token_log_share": share,
            "alarms": {ALARM: "more than 5% of routers differ."},
        },
    )
    for step in range(steps + 1):
        done = step / max(steps, 1)
        row = {"step": step}
        if step == 0 or step == steps or step % 20 == 0:
            greedy = 0.3 + 0.4 * done
            row |= {
                "eval/greedy": greedy,
                "eval/pass@1": greedy - 0.04,
                f"eval/pass@{k}": min(1.0, greedy + 0.25),
                "eval/problems": 500,
            }
        if step:
            by_layer = np.linspace(0.02, 0.12, layers) * (1 + done) * rng.uniform(0.8, 1.2, layers)
            tokens = int(rng.integers(2000, 3000))
            mismatched = int((by_layer * tokens).sum())
            router = mismatched / (tokens * layers) if layers else 0.0
            gap = 0.01 * (1 + done) * rng.uniform(0.8, 1.2)
            row |= {
                "reward/mean": 0.3 + 0.4 * done + 0.04 * rng.standard_normal(),
                "reward/std": 0.45,
                "response/length_mean": 5 + 0.3 * rng.standard_normal(),
                "response/finished_rate": 0.99,
                "entropy/mean": 0.6 * np.exp(-2 * done) + 0.02 * rng.random(),
                "kl/warm_start": 0.2 * done + 0.01 * rng.random(),
                "loss/policy": -0.01,
                "grad_norm": 0.5 + 0.2 * rng.random() + (rng.random() < 0.02),
                "clip/positive": 0.0 if loss.startswith("up") else 0.03 * rng.random(),
                "clip/negative": 0.05 * rng.random(),
                "ratio/max": 2.0,
                "logp_gap/mean_abs": gap,
                "logp_gap/k3": gap**2,
                "logp_gap/max_abs": 30 * gap,
                "time/generate": 1.0,
                "time/old_log_probs": 0.3,
                "time/update": 0.6,
                "time/logging": 0.1,
                "time/total": 2.0,
                "tokens/sampled": sequences * length if level == "full" else tokens,
                "tokens_per_second": tokens / 2.0,
            }
            row |= {f"logp_gap/{name}": q * 0.05 for name, q in QUANTILES.items()}
            row |= {
                f"{name}/beyond_{f}": 0.01 / f for name in ("logp_gap", "ratio") for f in (2, 10)
            }
            row |= {"logp_gap/pareto_k": 0.3, "ratio/pareto_k": 0.4}
            row["alarms"] = [ALARM] if step % 7 == 1 else []
            if step == 1 or step % 10 == 0:
                row |= analysed(layers, tokens, gap, replay)
            if layers:
                row |= {
                    "mismatch/router_rate": router,
                    "mismatch/slot_rate": router / 2,
                    "mismatch/token_any_rate": 0.8 * (1 - np.prod(1 - by_layer)),
                    "mismatch/routers_per_token": router * layers,
                    "mismatch/by_layer": by_layer,
                    "mismatch/histogram": histogram(tokens, by_layer),
                    "mismatch/router_numerator": mismatched,
                    "mismatch/router_denominator": tokens * layers,
                }
            if level != "aggregate":
                found = random_tokens(rng, layers, sequences=sequences, length=length)
                write_tokens(run.path, step, found, layers, level=level, share=share)
        run.append_metrics(row)
    return run.path


def histogram(tokens: int, rates) -> np.ndarray:
    """Tokens with 0..L differing layers, as a binomial of the mean rate."""
    layers = len(rates)
    m = np.random.default_rng(1).binomial(layers, np.mean(rates), tokens)
    return np.bincount(m, minlength=layers + 1)


def analysed(layers: int, tokens: int, gap: float, replay: str) -> dict:
    """Columns that the analysed steps log beside the others."""
    row = {}
    for kind, floor in FLOORS.items():
        if kind.startswith("trainer"):
            row[f"noise/{kind}/logp_mean_abs"] = floor / 10
        if layers:
            by_layer = np.full(layers, floor)
            row |= {
                f"noise/{kind}/router_rate": floor,
                f"noise/{kind}/token_any_rate": 1 - (1 - floor) ** layers,
                f"noise/{kind}/by_layer": by_layer,
                f"noise/{kind}/histogram": histogram(tokens, by_layer),
            }
    if not layers:
        return row
    row |= {
        "conditional/router_rate": 0.002,
        "conditional/token_any_rate": 1 - 0.998**layers,
        "conditional/by_layer": np.full(layers, 0.002),
        "time/decomposition": 0.5,
    }
    gone = {"R2": ("routing_shift",), "R3": ("engine_routing", "routing_shift")}.get(replay, ())
    for term, part in TERMS.items():
        for name in ("gap",) * (term not in gone) + ("counterfactual",) * (
            term in UNSEEN.get(replay, ())
        ):
            row |= {f"{name}/{term}/mean": 0.0, f"{name}/{term}/mean_abs": part * gap}
    return row


def random_tokens(rng, layers: int, *, sequences: int = 8, length: int = 6) -> dict:
    """Responses whose layers differ with probability 1/4; gap and weight grow with mismatches.

    |logp_old − logp_rollout| is 0.05 · own mismatches · |z|, the gradient weight 1 for A > 0, 0
    for A = 0 and 1 + prefix / 100 for A < 0.
    """
    num_tokens = sequences * length
    rollout = rng.random((num_tokens, layers, 8)).argpartition(2, axis=-1)[..., :2]
    differs = rng.random((num_tokens, layers)) < min(0.25, 3 / max(layers, 1))
    train = np.where(differs[..., None], (rollout + 2) % 8, rollout)
    shared = (rollout[..., :, None] == train[..., None, :]).sum(axis=(2, 3))
    own = (shared < 2).sum(axis=1)
    by_sequence = own.reshape(sequences, length)
    prefix = (by_sequence.cumsum(axis=1) - by_sequence).ravel()
    logp_old = -rng.random(num_tokens)
    advantage = np.repeat(rng.choice([-1.0, 0.0, 1.0], sequences), length)
    routes = {}
    if layers:
        routes = {
            "rollout_routes": rollout,
            "train_routes": train,
            "prefix_mismatched": prefix,
            "margin_min": rng.exponential(0.02, num_tokens) / (1 + own),
        }
    return routes | {
        "sequence": np.repeat(np.arange(sequences), length),
        "position": np.tile(np.arange(length) + 5, sequences),
        "token_id": rng.zipf(1.5, num_tokens) % 151_936,
        "advantage": advantage,
        "logp_old": logp_old,
        "logp_rollout": logp_old - 0.05 * own * rng.standard_normal(num_tokens),
        "ratio": np.exp(0.1 * rng.standard_normal(num_tokens)),
        "clipped": (advantage < 0) & (rng.random(num_tokens) < 0.02 * own),
        "gradient_weight": np.select([advantage > 0, advantage < 0], [1, 1 + prefix / 100]),
        "overlap": shared,
    }


def write_tokens(run: Path, step: int, columns: dict, layers: int, *, rank=0, **options) -> Path:
    """Rows of a token log, top-2 of 8; what `columns` does not say is zero, a ratio 1."""
    num_tokens = len(columns["sequence"])
    overlap = np.asarray(columns.get("overlap", np.full((num_tokens, layers), 2)))
    integers, floats = ("prompt", "position", "token_id"), ("reward", "advantage")
    log_probs = ("logp_rollout", "logp_old", "logp_train")
    rows = {
        **{name: np.zeros(num_tokens, int) for name in integers},
        **{name: np.zeros(num_tokens) for name in floats + log_probs},
        "ratio": np.ones(num_tokens),
        "clipped": np.zeros(num_tokens, bool),
        "layers_mismatched": (overlap < 2).sum(axis=1),
        "overlap": overlap,
        **{name: np.asanyarray(values) for name, values in columns.items()},
    }
    writer = TokenLogWriter(
        run / "tokens", rank=rank, layer_ids=range(1, layers + 1), top_k=2, num_experts=8, **options
    )
    return writer.write(step, rows)
