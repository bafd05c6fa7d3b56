"""Made-up pairs of engine and trainer, of any shape, that agree except for rounding.

A token's hidden state consists of its embedding, the tokens before it, and its layer; each router
multiplies it by its own matrix. The engine's hidden states carry noise that grows with depth, so
experts are exchanged where they nearly tie, as in bf16. Log-probs come from logits over a
vocabulary, which carry such noise as well; tokens are sampled from the engine's.

Shape suffixes: S tokens, L MoE layers, K experts per token, E experts, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moe_upgrpo.tools.diagnose.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model, the prompts and the rounding of a pair."""

    experts: int = 16
    top_k: int = 4
    layers: int = 6
    prompts: int = 10
    samples: int = 2
    prompt_tokens: int = 6
    tokens: int = 24
    noise: float = 0.01
    vocabulary: int = 48
    hidden: int = 24


@dataclass(kw_only=True)
class Pair:
    """Records of both sides, and the logits that the log-probs were made from."""

    evidence: Evidence
    logits: list[np.ndarray]
    """The engine's logits at the response tokens, B × [T, V]."""
    hidden: list[np.ndarray]
    """Hidden states of the trainer, B × [S−1, L, D]."""
    routers_LDE: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def chosen(scores: np.ndarray, top_k: int) -> np.ndarray:
    """The experts with the largest scores, in descending order."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :top_k].astype(np.int16)


@cache
def make_pair(shape: Shape | None = None, *, seed: int = 0) -> Pair:
    """Both sides of the same tokens, which differ only by rounding. Made once; do not change it."""
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    L, D, E = shape.layers, shape.hidden, shape.experts
    embedding = rng.standard_normal((shape.vocabulary, D))
    mixing = rng.standard_normal((L, D, D)) / np.sqrt(D)
    routers = rng.standard_normal((L, D, E)) / np.sqrt(D)
    head = rng.standard_normal((D, shape.vocabulary)) * 2.5 / np.sqrt(D)
    pair = Pair(
        evidence=Evidence(
            prompt=[],
            tokens=[],
            response=[],
            rollout_routes=[],
            train_routes=[],
            logp_rollout=[],
            logp_train=[],
            margins=[],
            num_experts=E,
            layer_ids=list(range(L)),
            temperature=1.0,
        ),
        logits=[],
        hidden=[],
        routers_LDE=routers,
    )
    for prompt in range(shape.prompts):
        start = rng.integers(0, shape.vocabulary, shape.prompt_tokens)
        for _ in range(shape.samples):
            _add_sequence(pair, shape, prompt, start, (embedding, mixing, head), rng)
    return pair


def _add_sequence(pair: Pair, shape: Shape, prompt: int, start, model, rng) -> None:
    embedding, mixing, head = model
    length = int(rng.integers(shape.tokens // 2, shape.tokens + 1))
    tokens, memory = list(start), np.zeros(shape.hidden)
    hidden, noisy, logits = [], [], []
    while True:
        memory = 0.7 * memory + 0.5 * embedding[tokens[len(hidden)]]
        x = embedding[tokens[len(hidden)]] + memory
        y = x + shape.noise * rng.standard_normal(shape.hidden)
        layers, engine = [], []
        for matrix in mixing:
            x, y = x + np.tanh(x @ matrix), y + np.tanh(y @ matrix)
            y = y + shape.noise * rng.standard_normal(shape.hidden)
            layers.append(x)
            engine.append(y)
        hidden.append(np.array(layers))
        noisy.append(np.array(engine))
        if len(hidden) >= len(start):
            # Logits of a layer that has been normalised.
            logits.append((x / np.sqrt((x**2).mean()) @ head, y / np.sqrt((y**2).mean()) @ head))
            p = np.exp(log_softmax(logits[-1][1]))
            tokens.append(int(rng.choice(len(p), p=p / p.sum())))
        if len(tokens) == len(start) + length:
            break
    e = pair.evidence
    rows = len(tokens) - 1
    hidden_SLD, noisy_SLD = np.array(hidden[:rows]), np.array(noisy[:rows])
    scores, engine_scores = (
        np.einsum("sld,lde->sle", h, pair.routers_LDE) for h in (hidden_SLD, noisy_SLD)
    )
    ordered = -np.sort(-scores, axis=-1)
    e.prompt.append(prompt)
    e.tokens.append(np.array(tokens))
    e.response.append(slice(len(start) - 1, rows))
    e.rollout_routes.append(chosen(engine_scores, shape.top_k))
    e.train_routes.append(chosen(scores, shape.top_k))
    margin = ordered[..., shape.top_k - 1] - ordered[..., min(shape.top_k, shape.experts - 1)]
    e.margins.append(margin.astype(np.float32))
    train, engine = (np.array([pairs[i] for pairs in logits]) for i in (0, 1))
    sampled = np.array(tokens[len(start) :])
    at = np.arange(len(sampled))
    e.logp_train.append(log_softmax(train)[at, sampled])
    e.logp_rollout.append(log_softmax(engine)[at, sampled])
    pair.logits.append(engine)
    pair.hidden.append(hidden_SLD)


CLEAN: dict[str, Shape] = {
    "the usual": Shape(),
    "128 experts, top-8": Shape(experts=128, top_k=8, layers=4, noise=0.02),
    "top-1": Shape(experts=8, top_k=1, noise=0.03),
    "2 layers": Shape(layers=2, noise=0.02),
    "24 layers": Shape(layers=24, prompts=8, samples=1, noise=0.004),
    "one layer": Shape(layers=1, noise=0.03),
    "coarse, as in FP8": Shape(noise=0.08),
    "fp32": Shape(noise=1e-6),
    "60 experts, top-4, long": Shape(experts=60, prompts=8, samples=1, tokens=64, layers=4),
    "few tokens": Shape(prompts=12, samples=4, prompt_tokens=3, tokens=4, vocabulary=12),
    "8 experts, top-7": Shape(experts=8, top_k=7, noise=0.02),
    "512 experts, top-10": Shape(experts=512, top_k=10, layers=2, prompts=8, samples=1, noise=0.02),
}
"""Pairs in which no fault should be found, by name."""
