"""Useful share of a step: sequences counted, and sequences by a budget of tokens, simulated.

    python -m benchmarks.micro.balance

lognormal lengths (sigma .7, median 2,000, at most 8,192 tokens), a mini-batch of 32 sequences for
each data-parallel rank, the cost of Qwen3-30B-A3B. Real cost of all sequences over the number of
ranks times the padded cost of the slowest: what is not padding or waiting. "counted": --micro-batch
2, what the same memory holds at the longest, in the order drawn, each rank its own. "budget":
--micro-batch-tokens 16384. "packed": the same with --packing, in any layout. "budget, PP": padded,
where all micro-batches have one shape. Lowest and highest of the seeds; no model is run.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from moe_upgrpo.megatron.balance import (
    Cost,
    Limit,
    counted,
    equal_shares,
    packed_shares,
    shares,
    useful_share,
)
from moe_upgrpo.megatron.families import read_model_config

MODEL = Path(__file__).parents[2] / "examples" / "configs" / "models" / "qwen3-30b-a3b"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One simulated mini-batch. sequences: for each rank."""

    ranks: int
    sequences: int = 32
    median: int = 2000
    longest: int = 8192
    tokens: int = 16_384
    sigma: float = 0.7


def lengths_of(setting: Setting, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    count = setting.ranks * setting.sequences
    drawn = np.exp(rng.normal(np.log(setting.median), setting.sigma, count))
    return np.clip(drawn, 1, setting.longest).astype(int).tolist()


def trial(setting: Setting, seed: int) -> dict[str, float]:
    """Useful shares, by the column."""
    lengths, cost = lengths_of(setting, seed), Cost.of(read_model_config(MODEL))
    rows = Limit(sequences=1, tokens=setting.tokens).rows(setting.longest)
    of_count = counted([setting.sequences] * setting.ranks, rows)
    given = {"ranks": setting.ranks, "tokens": setting.tokens}
    packed = packed_shares(lengths, **given, cost=cost)
    dealt, (_, longest) = equal_shares(lengths, **given)
    most = max(sum(map(len, share)) for share in dealt)
    return {
        "counted": useful_share(lengths, of_count, cost),
        "budget": useful_share(lengths, shares(lengths, **given, cost=cost), cost),
        "packed": useful_share(lengths, packed, cost, packed=True),
        "budget, PP": sum(map(cost, lengths)) / (setting.ranks * most * cost(longest)),
    }


def main(arguments: list[str] | None = None) -> None:
    tyro.cli(table, args=arguments)


def table(seeds: int = 20, sequences: int = 32) -> None:
    """Print the useful shares at DP4, DP16 and DP32. sequences: of each rank's mini-batch."""
    print(f"lognormal lengths, {sequences} sequences a rank, {seeds} seeds: useful share of a step")
    for ranks in (4, 16, 32):
        setting = Setting(ranks=ranks, sequences=sequences)
        found = [trial(setting, seed) for seed in range(seeds)]
        if ranks == 4:
            print(f"{'':6} " + " ".join(f"{name:>12}" for name in found[0]))
        columns = zip(*(one.values() for one in found), strict=True)
        spans = [f"{min(column):.2f} to {max(column):.2f}" for column in columns]
        print(f"{'DP' + str(ranks):6} " + " ".join(f"{span:>12}" for span in spans))


if __name__ == "__main__":
    main()
