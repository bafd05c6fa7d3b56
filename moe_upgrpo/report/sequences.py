"""A few responses of the last step, token by token, with both sides' experts where they differ.

Shape suffixes: N rows (tokens), L MoE layers, K experts per token (top-k).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_upgrpo.errors import UserError
from moe_upgrpo.report.figures import number
from moe_upgrpo.report.runs import Run
from moe_upgrpo.report.tokens import finite
from moe_upgrpo.store import TokenLayout, overlap_array, read_routes, read_tokens
from moe_upgrpo.store.parquet import column_names
from moe_upgrpo.store.token_log import token_files

DIVERGING = 3
MAX_TOKENS = 400  # shown of one response, around its largest |gap|
_MAX_LAYERS = 12  # named of a token
# |gap| in nats at which a token starts to be coloured, and at which it is fully so.
COLORED_FROM, COLORED_TO = 0.01, 1.0

READ = (
    f"Each box is a token, by its id; the fuller its colour, the larger |gap| (log scale, from "
    f"{COLORED_FROM:g} to {COLORED_TO:g} nats); a line below it marks mismatched layers, thicker "
    "with their share. Point at one, tap it or go to it by Tab for its log-probs and for the "
    "experts of the layers that differ."
)


def sequences(run: Run) -> list[dict[str, Any]]:
    """Responses of the newest step: those with the largest |gap| in a token, then of the rest the
    one with the most mismatched layers per token, then one drawn at random."""
    if run.tokens.layout is None:
        return []
    step = run.tokens.steps[-1]
    parts = list(run.tokens.parts(run.tokens.column_names, [step]))
    if not parts:
        return []
    table = pa.concat_tables(parts, promote_options="default")
    gap_N = np.abs(_gap(table))
    gap_N[np.isnan(gap_N)] = math.inf
    ids, sequence_N, length = np.unique(
        table["sequence"].to_numpy(), return_inverse=True, return_counts=True
    )
    largest = np.zeros(len(ids))
    np.maximum.at(largest, sequence_N, gap_N)
    mismatched = np.bincount(sequence_N, table["layers_mismatched"].to_numpy()) / length
    rest = np.argsort(-largest, kind="stable").tolist()
    chosen = [(i, "one of the largest |gap|") for i in rest[:DIVERGING]]
    rest = rest[DIVERGING:]
    if rest and mismatched[rest].any():
        most = rest.pop(int(mismatched[rest].argmax()))
        chosen.append((most, "the most mismatched layers per token of the others"))
    if rest:
        drawn_at = np.random.default_rng(0).integers(len(rest))
        chosen.append((sorted(rest)[drawn_at], "drawn at random"))
    chosen = [(int(ids[i]), why) for i, why in chosen]
    experts, refused = _experts(run.path, step, [i for i, _ in chosen])
    return [
        {"run": run.label, "step": step, "sequence": i, "chosen": why, "routes_refused": refused}
        | _sequence(table.filter(pc.equal(table["sequence"], i)), experts)
        for i, why in chosen
    ]


def _gap(table: pa.Table) -> np.ndarray:
    """logp_old − logp_rollout ``[N]``, in float64."""
    old, rollout = (table[name].to_numpy().astype(float) for name in ("logp_old", "logp_rollout"))
    return old - rollout


def _experts(
    run: Path, step: int, ids: Sequence[int]
) -> tuple[dict[tuple[int, int], np.ndarray], list[str]]:
    """Both sides' experts ``[2, L, K]`` by (sequence, position), where routes are logged.

    And, for each file that refused, why. A file is read at a time and reduced to the sequences
    asked for.
    """
    found, refused = {}, []
    columns = ("step", "sequence", "position", "rollout_experts", "train_experts")
    for file, of_step in token_files(run / "tokens"):
        if of_step != step:
            continue
        try:
            if "rollout_experts" not in column_names(file):
                continue  # version 1, a dense model, or a run that logged none
            table = read_tokens(file, columns=columns)
            table = table.filter(pc.is_in(table["sequence"], pa.array(ids, pa.int64())))
            table = table.drop_null()
            if table.num_rows:
                places = zip(*(table[c].to_pylist() for c in columns[1:3]), strict=True)
                found |= dict(zip(places, np.stack(read_routes(table), axis=1), strict=True))
        except (UserError, pa.ArrowException, OSError) as error:
            refused.append(f"{file.name}: {error}")
    return found, refused


def _sequence(table: pa.Table, experts: dict[tuple[int, int], np.ndarray]) -> dict[str, Any]:
    """Reward, advantage and tokens of one sequence, by position."""
    layout = TokenLayout.of(table.schema)
    table = table.sort_by("position")
    length = table.num_rows
    worst = int(np.nan_to_num(np.abs(_gap(table)), nan=math.inf).argmax())
    first_shown = min(max(0, worst - MAX_TOKENS // 2), max(0, length - MAX_TOKENS))
    table = table.slice(first_shown, MAX_TOKENS)
    tokens = []
    for row, gap, shared_L in zip(
        table.to_pylist(), _gap(table), overlap_array(table), strict=True
    ):
        sides = experts.get((row["sequence"], row["position"]))
        layers = [
            {"layer": layout.layer_ids[i], "shared": int(shared_L[i])}
            | (
                {}
                if sides is None
                else {"rollout": sides[0, i].tolist(), "train": sides[1, i].tolist()}
            )
            for i in np.flatnonzero(shared_L < layout.top_k)
        ]
        names = ("position", "token_id", "logp_rollout", "logp_old", "ratio")
        values = {name: row[name] for name in names} | {"gap": float(gap)}
        tokens.append({k: finite(v) for k, v in values.items()} | {"layers": layers})
    first = table.slice(0, 1).to_pylist()[0]
    return {
        "reward": finite(first["reward"]),
        "advantage": finite(first["advantage"]),
        "length": length,
        "first_shown": first_shown,
        "num_layers": layout.num_layers,
        "tokens": tokens,
    }


def says(run: Run, shown: list[dict[str, Any]]) -> str:
    """Where the step's largest |gap| is, and how many layers differ there."""
    if not shown:
        return run.tokens.note
    first = shown[0]
    known = [token for token in first["tokens"] if token["gap"] is not None]
    if len(known) < len(first["tokens"]):
        return (
            f"sequence {first['sequence']} of step {first['step']} holds a gap that is no number."
        )
    worst = max(known, key=lambda token: abs(token["gap"]))
    refused = "".join(f" Routes not readable: {reason}." for reason in first["routes_refused"])
    return (
        f"the largest |gap| shown of step {first['step']} is {number(abs(worst['gap']))} nats, at "
        f"position {worst['position']} of sequence {first['sequence']}, where "
        f"{len(worst['layers'])} of {first['num_layers']} MoE layers differ.{refused}"
    )


def drawn(token: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """How the page shows a token: text, fill 0..1, width of its line, and what it tells."""
    gap = COLORED_TO if token["gap"] is None else abs(token["gap"])
    gap = min(max(gap, COLORED_FROM), COLORED_TO)
    lines = [
        f"position {token['position']}, token id {token['token_id']}",
        f"log p: engine {_value(token['logp_rollout'])}, trainer {_value(token['logp_old'])}, "
        f"gap {_value(token['gap'])}",
        f"ratio {_value(token['ratio'])} at the last optimizer visit",
    ]
    for layer in token["layers"][:_MAX_LAYERS]:
        if "rollout" in layer:
            sides = (" ".join(map(str, layer[side])) for side in ("rollout", "train"))
            lines.append("layer {}: engine {} / trainer {}".format(layer["layer"], *sides))
        else:
            lines.append(f"layer {layer['layer']}: experts shared: {layer['shared']}")
    if (hidden := len(token["layers"]) - _MAX_LAYERS) > 0:
        lines.append(f"and {hidden} more layers")
    return {
        "text": token["token_id"],
        "fill": round(math.log(gap / COLORED_FROM) / math.log(COLORED_TO / COLORED_FROM), 2),
        "line": round(2 + 3 * len(token["layers"]) / num_layers) if token["layers"] else 0,
        "about": "\n".join(lines),
    }


def _value(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.4g}"
