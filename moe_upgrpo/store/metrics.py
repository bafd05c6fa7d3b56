# SPDX-License-Identifier: Apache-2.0
"""Names of metrics.jsonl: what each means, what it is divided by and its unit.

A row is one training step: "step" and these keys. Eval keys appear only at evaluated steps; step 0
is the warm start before training. The trainer writes the names, the report reads them, and the
table of the documentation is `markdown_table`.
"""

import re
from dataclasses import dataclass

from moe_upgrpo.errors import UserError


@dataclass(frozen=True)
class Metric:
    """``meaning`` is the formula, ``normaliser`` what a mean or rate is divided by."""

    meaning: str
    normaliser: str
    unit: str


_TOKENS = "response tokens of the step"
_SEQUENCES = "sequences of the step"
_ROUTERS = "(token, MoE layer) pairs"
_PROBLEMS = "held-out problems"
_VISITS = "token visits by optimizer steps"

METRICS: dict[str, Metric] = {
    "reward/mean": Metric("mean reward", _SEQUENCES, "reward"),
    "reward/std": Metric("standard deviation of the reward", _SEQUENCES, "reward"),
    "reward/correct_rate": Metric(
        "share of right responses; under dynamic sampling of all that were sampled, also of groups "
        "that were left out",
        "responses sampled for the step",
        "share",
    ),
    "reward/failed_rate": Metric(
        "share of responses for which the reward raised, hung or gave no finite number; they earn "
        "0 and count as wrong",
        "responses sampled for the step",
        "share",
    ),
    "reward/of/NAME": Metric(
        "mean of one of several rewards, by its name, before its weight",
        "responses sampled for the step that it judged",
        "reward",
    ),
    "groups/mixed_rate": Metric(
        "share of groups with right and wrong responses, or with any rewards that differ before "
        "their lengths count: any other has advantages of 0, unless its rewards differ by length",
        "groups sampled for the step",
        "share",
    ),
    "groups/sampled": Metric("groups sampled for the step, refills included", "none", "groups"),
    "groups/kept": Metric("groups trained on", "none", "groups"),
    "verifier/killed_rate": Metric(
        "share of responses that took the verifier too long; they count as wrong",
        "responses sampled for the step",
        "share",
    ),
    "response/length_mean": Metric("mean response length", _SEQUENCES, "tokens"),
    "response/finished_rate": Metric(
        "share of responses ended by the end token", _SEQUENCES, "share"
    ),
    "staleness/mean": Metric(
        "RL steps between the weights that sampled a sequence and the trainer's",
        _SEQUENCES,
        "steps",
    ),
    "entropy/mean": Metric("mean of −Σ_v π(v) log π(v), the trainer's", _TOKENS, "nats"),
    "entropy/sampled": Metric(
        "mean of −log p_rollout: an estimate of the entropy at the sampling temperature",
        _TOKENS,
        "nats",
    ),
    "advantage/nonzero_rate": Metric("share of tokens with an advantage", _TOKENS, "share"),
    "weights/changed_rate": Metric(
        "share of this model part's parameter tensors that the step's updates changed",
        "parameter tensors of rank 0",
        "share",
    ),
    "kl/warm_start": Metric(
        "KL(π ‖ π_warm start) by k3 on sampled tokens: exp(d) − 1 − d, d = log π_warm − log π",
        _TOKENS,
        "nats",
    ),
    "kl/reference": Metric(
        "the KL term's estimate (k1, k2 or k3) of KL(π ‖ π_reference), on sampled tokens: in the "
        "loss at the weights of each visit, in the reward at the old ones",
        f"{_VISITS}; in the reward {_TOKENS}",
        "nats",
    ),
    "kl/reward_penalty": Metric(
        "mean of β·Σ_t k, what the KL term took off a response's reward; reward/mean is without it",
        _SEQUENCES,
        "reward",
    ),
    "entropy/visits": Metric(
        "mean of −Σ_v π(v) log π(v) where the entropy bonus is in the loss", _VISITS, "nats"
    ),
    "entropy/coef": Metric("α of the entropy bonus in this step", "none", "coefficient"),
    "loss/policy": Metric(
        "the policy loss, mean over the step's optimizer steps", "set by the loss", "loss"
    ),
    "loss/kl": Metric(
        "β·KL as added to the policy loss, mean over the step's optimizer steps",
        "as loss/policy",
        "loss",
    ),
    "loss/entropy": Metric(
        "−α·H as added to the policy loss, mean over the step's optimizer steps",
        "as loss/policy",
        "loss",
    ),
    "grad_norm": Metric(
        "global L2 norm of the gradient before clipping, mean over optimizer steps",
        "optimizer steps",
        "norm",
    ),
    "recompute/router_flips": Metric(
        "pairs whose router, run again in the backward pass (--recompute full), would have chosen "
        "other experts than in the forward, to which it was held; left out where there are none",
        "none",
        _ROUTERS,
    ),
    "clip/positive": Metric(
        "share of tokens with advantage > 0 whose gradient the loss's rule took away",
        f"{_VISITS}, advantage > 0",
        "share",
    ),
    "clip/negative": Metric(
        "share of tokens with advantage < 0 whose gradient the loss's rule took away",
        f"{_VISITS}, advantage < 0",
        "share",
    ),
    "ratio/max": Metric("largest exp(log p_train − log p_old)", "none", "ratio"),
    "ratio/beyond_F": Metric(
        "share of tokens whose ratio is further than F times from 1, either way: F is 2 and 10",
        _TOKENS,
        "share",
    ),
    "ratio/pareto_k": Metric("tail index k of the ratios, as logp_gap/pareto_k", "none", "k"),
    "mismatch/router_rate": Metric("mean of 1[S ≠ S′]", _ROUTERS, "share"),
    "mismatch/slot_rate": Metric("1 − mean of |S ∩ S′| / K", f"{_ROUTERS} × K slots", "share"),
    "mismatch/token_any_rate": Metric(
        "share of tokens with S ≠ S′ in at least one layer", _TOKENS, "share"
    ),
    "mismatch/routers_per_token": Metric("mean number of layers with S ≠ S′", _TOKENS, "layers"),
    "mismatch/by_layer": Metric(
        "mean of 1[S ≠ S′] in each MoE layer: a list of L rates", _TOKENS, "share"
    ),
    "mismatch/by_position": Metric(
        "mean of 1[S ≠ S′] in the bins of logp_gap/by_position: a list of 13",
        "(token, MoE layer) pairs there",
        "share",
    ),
    "mismatch/histogram": Metric(
        "tokens with 0, 1, ..., L layers in which S ≠ S′: a list of L + 1 counts", "none", "tokens"
    ),
    "mismatch/zero_rows_by_layer": Metric(
        "share of tokens whose rollout row is all expert 0 in each MoE layer: possible with top-1 "
        "only, where a zero-filled row passes for a choice; a list of L rates",
        _TOKENS,
        "share",
    ),
    "mismatch/repeated_rows": Metric(
        "share of tokens whose rollout row is that of another input: of the token before it, or, "
        "all rows of a response alike, of another response",
        _TOKENS,
        "share",
    ),
    "mismatch/repeated_rows_trainer": Metric(
        "the same of the trainer's rows: what chance and few experts make of it", _TOKENS, "share"
    ),
    "mismatch/router_numerator": Metric("pairs with S ≠ S′", "none", _ROUTERS),
    "mismatch/router_denominator": Metric("pairs compared", "none", _ROUTERS),
    "mismatch/tokens_without_routes": Metric(
        "response tokens without the rollout's routes, left out of rows and metrics (NeMo-RL)",
        "none",
        "tokens",
    ),
    "conditional/router_rate": Metric(
        "mean of 1[S ≠ the router's own top-k] in a forward held to S: flips of each layer alone",
        _ROUTERS,
        "share",
    ),
    "conditional/token_any_rate": Metric(
        "share of tokens with such a flip in at least one layer", _TOKENS, "share"
    ),
    "conditional/by_layer": Metric(
        "the same in each MoE layer: a list of L rates", _TOKENS, "share"
    ),
    "conditional/histogram": Metric(
        "tokens with such a flip in 0, 1, ..., L layers: a list of L + 1 counts", "none", "tokens"
    ),
    "conditional/gate_overlap": Metric(
        "mean of Σ_{e ∈ S ∩ S′} min(g, g′): gates g of the trainer's forward held to S, g′ of its "
        "native one, S′ its own experts there",
        _ROUTERS,
        "share",
    ),
    "logp_gap/mean_abs": Metric(
        "mean of |d|, d = log p_train(θ_old) − log p_rollout", _TOKENS, "nats"
    ),
    "logp_gap/k3": Metric("KL(rollout ‖ train) by k3: mean of exp(d) − 1 − d", _TOKENS, "nats"),
    "logp_gap/max_abs": Metric("largest |d|", "none", "nats"),
    "logp_gap/pQ": Metric(
        "quantile of |d|, to 12%: p50, p90, p99, p99_9, p99_99; one beyond which no token of the "
        "step lies is left out",
        "none",
        "nats",
    ),
    "logp_gap/beyond_F": Metric(
        "share of tokens that the two sides give probabilities more than F times apart, either "
        "way: F is 2 and 10",
        _TOKENS,
        "share",
    ),
    "logp_gap/pareto_k": Metric(
        "tail index k of exp(d): a generalised Pareto distribution fitted to the largest "
        "min(N/5, 3√N), as PSIS does. Above .5 the ratios have no variance, above .7 no weighting "
        "by them is to be trusted, above 1 they have no mean",
        "none",
        "k",
    ),
    "logp_gap/by_position": Metric(
        "mean |d| by position in prompt and response: below 16, 16 to 31, doubling to 16,384 to "
        "32,767, and from 32,768 on; null where no token is: a list of 13",
        "response tokens there",
        "nats",
    ),
    "gap/TERM/mean": Metric(
        "mean of a term of log p_train − log p_rollout: numerics, engine_routing, update, "
        "routing_shift or, with overlap, staleness (`routing.decomposition`); under R2 and R3 "
        "those that the loss sees",
        _TOKENS,
        "nats",
    ),
    "gap/TERM/mean_abs": Metric("mean of the term's absolute value", _TOKENS, "nats"),
    "counterfactual/TERM/mean": Metric(
        "mean of a term that replay takes out of the loss: routing_shift (R2), engine_routing (R3)",
        _TOKENS,
        "nats",
    ),
    "counterfactual/TERM/mean_abs": Metric("mean of the term's absolute value", _TOKENS, "nats"),
    "noise/KIND/router_rate": Metric(
        "mean of 1[S ≠ S′] between two passes of one side over the same tokens. KIND: "
        "trainer_repeat and engine_repeat (identical passes), trainer_batch_shape (other "
        "neighbours, padding and sizes), engine_batch_shape (sampling against one pass over the "
        "whole sequence)",
        _ROUTERS,
        "share",
    ),
    "noise/KIND/token_any_rate": Metric(
        "share of tokens with S ≠ S′ in at least one layer, between the two", _TOKENS, "share"
    ),
    "noise/KIND/by_layer": Metric(
        "mean of 1[S ≠ S′] in each MoE layer: a list of L rates", _TOKENS, "share"
    ),
    "noise/KIND/histogram": Metric(
        "tokens with 0, 1, ..., L layers in which S ≠ S′: a list of L + 1 counts", "none", "tokens"
    ),
    "noise/KIND/logp_mean_abs": Metric(
        "mean |log p − log p′| between the two; the trainer's only", _TOKENS, "nats"
    ),
    "noise/KIND/k3": Metric("KL by k3 between the two; the trainer's only", _TOKENS, "nats"),
    "loss/NAME": Metric("a metric of the loss library: docs/losses.md", "see there", "see there"),
    "eval/greedy": Metric("share solved by the greedy answer", _PROBLEMS, "share"),
    "eval/pass@1": Metric("probability that one sampled answer is right", _PROBLEMS, "share"),
    "eval/pass@K": Metric(
        "probability that one of K sampled answers is right; K stands as a number, eval/pass@8",
        _PROBLEMS,
        "share",
    ),
    "eval/avg@K": Metric(
        "mean over the K samples of 1[right]: the estimate of pass@1, under its other name",
        _PROBLEMS,
        "share",
    ),
    "eval/maj@K": Metric(
        "share whose most frequent answer among K samples is right; a tie of t answers counts the "
        "right ones among them as 1/t, samples without an answer do not vote",
        _PROBLEMS,
        "share",
    ),
    "eval/best@K": Metric(
        "share with a right answer among K samples: pass@K of all samples, under its other name",
        _PROBLEMS,
        "share",
    ),
    "eval/problems": Metric("held-out problems evaluated", "none", "problems"),
    "time/generate": Metric("rollout", "none", "s"),
    "time/old_log_probs": Metric("forward at the old weights, routes recorded", "none", "s"),
    "time/analysis": Metric("gap and noise floor, before the update", "none", "s"),
    "time/decomposition": Metric(
        "the forwards that only the decomposition needs, part of time/analysis and time/update",
        "none",
        "s",
    ),
    "time/update": Metric("optimizer steps", "none", "s"),
    "time/logging": Metric("token log and metrics", "none", "s"),
    "time/total": Metric("the whole step", "none", "s"),
    "time/cpu": Metric("CPU time of the whole step", "none", "s, summed over ranks"),
    "time/waiting/PHASE": Metric(
        "the share of time/PHASE in which ranks waited (for each other, an engine or a disk) and "
        "neither ran nor queued for a core; on Linux, without CUDA",
        "seconds of all ranks",
        "share",
    ),
    "alarms": Metric(
        "names of the alarms this step raised: moe_upgrpo/record/alarms.py", "none", "list"
    ),
    "alarms/raised": Metric("how many they are", "none", "alarms"),
    "alarms/NAME": Metric("what a raised alarm saw, in the unit of its limit", "none", "its own"),
    "tokens/visited": Metric("tokens/sampled × passes over the batch", "none", "tokens"),
    "tokens/sampled": Metric("response tokens sampled", "none", "tokens"),
    "tokens_per_second": Metric("tokens/sampled ÷ time/total", "seconds", "tokens/s"),
}


# Names with a variable part, and their entries.
_FAMILIES = {
    r"^eval/(pass|avg|maj|best)@\d+$": r"eval/\1@K",
    r"^gap/(numerics|staleness|engine_routing|update|routing_shift)/": "gap/TERM/",
    r"^counterfactual/(engine_routing|routing_shift)/": "counterfactual/TERM/",
    r"^time/waiting/[a-z_]+$": "time/waiting/PHASE",
    r"^noise/(trainer|engine)_(repeat|batch_shape)/": "noise/KIND/",
    r"^alarms/(?!raised$)[\w-]+$": "alarms/NAME",
    r"^loss/(?!policy$)\w+$": "loss/NAME",
    r"^reward/of/.+$": "reward/of/NAME",
    r"^logp_gap/p\d[\d_]*$": "logp_gap/pQ",
    r"^(logp_gap|ratio)/beyond_\d+$": r"\1/beyond_F",
}


def metric(name: str) -> Metric:
    """The glossary's entry; ``eval/pass@8`` is that of ``eval/pass@K``, and so on.

    Raises:
        UserError: no such metric.
    """
    key = name
    for pattern, entry in _FAMILIES.items():
        if name not in METRICS:
            key = re.sub(pattern, entry, key)
    if key not in METRICS:
        raise UserError(f"no metric {name!r} in the glossary; it has {', '.join(METRICS)}")
    return METRICS[key]


def markdown_table() -> str:
    """The glossary as a Markdown table, for the documentation."""
    lines = ["| name | meaning | divided by | unit |", "|---|---|---|---|"]
    for name, entry in METRICS.items():
        cells = (f"`{name}`", entry.meaning, entry.normaliser, entry.unit)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
