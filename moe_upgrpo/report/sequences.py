# SPDX-License-Identifier: Apache-2.0
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
from moe_upgrpo.store.text import printable
from moe_upgrpo.store.texts import as_texts, read_prompts, read_vocabulary
from moe_upgrpo.store.token_log import token_files

OF_EACH = 2  # sequences of each kind; ten at most in all
MAX_TOKENS = 400  # shown of one response, around its largest |gap|
_MAX_LAYERS = 12  # listed for a token
# |gap| and |log ratio| in nats at which a token begins to be coloured, and is fully coloured.
COLORED_FROM, COLORED_TO = 0.01, 1.0
FULL_ENTROPY, FULL_ADVANTAGE = 3.0, 2.0

# What tokens can be coloured by: key and name.
CHOICES = (
    ("gap", "gap"),
    ("mismatch", "mismatch"),
    ("ratio", "ratio"),
    ("entropy", "entropy"),
    ("advantage", "advantage"),
)
READ = (
    f"What the model wrote at the last step, after its prompt in grey. Colour: |gap| and |log "
    f"ratio| from {COLORED_FROM:g} to {COLORED_TO:g} nats (log scale), the share of mismatched "
    f"layers, entropy up to {FULL_ENTROPY:g} nats, |advantage| up to {FULL_ADVANTAGE:g} (blue "
    "above 0). A line below a token marks mismatched layers, thicker with their share; the strip "
    "below has a column for each token and a row for each MoE layer, the first on top, dark where "
    "it differs. Point at a token, tap it or go to it by Tab for its row."
)


def sequences(run: Run) -> list[dict[str, Any]]:
    """Responses of the newest step, two of each kind: the largest |gap| in a token, the most
    mismatched layers per token, the best and the worst rewarded, and drawn at random."""
    if run.tokens.layout is None:
        return []
    step = run.tokens.steps[-1]
    parts = list(run.tokens.parts(run.tokens.column_names, [step]))
    if not parts:
        return []
    table = pa.concat_tables(parts, promote_options="default")
    chosen = _chosen(table)
    experts, refused = _experts(run.path, step, [i for i, _ in chosen])
    found = [
        {"run": run.label, "step": step, "sequence": i, "chosen": why, "routes_refused": refused}
        | _sequence(table.filter(pc.equal(table["sequence"], i)), experts)
        for i, why in chosen
    ]
    return _with_texts(run.path, step, found)


def _chosen(table: pa.Table) -> list[tuple[int, str]]:
    """Sequences and why each is shown; none occurs twice."""
    gap_N, known_N = np.abs(_gap(table)), table["logp_old"].is_valid().to_numpy()
    gap_N[np.isnan(gap_N)] = math.inf
    gap_N[~known_N] = 0.0
    ids, first_N, sequence_N, length = np.unique(
        table["sequence"].to_numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    largest = np.zeros(len(ids))
    np.maximum.at(largest, sequence_N, gap_N)
    mismatched = np.bincount(sequence_N, table["layers_mismatched"].to_numpy()) / length
    rewards = np.nan_to_num(table["reward"].to_numpy()[first_N].astype(float))
    drawn_at_random = np.random.default_rng(0).permutation(len(ids))
    kinds = [(largest, "one of the largest |gap|")] if known_N.any() else []
    if mismatched.any():
        kinds.append((mismatched, "one of the most mismatched layers per token"))
    if rewards.min() < rewards.max():
        kinds += [(rewards, "one of the best rewards"), (-rewards, "one of the worst rewards")]
    kinds.append((drawn_at_random, "drawn at random"))
    chosen: dict[int, str] = {}
    for score, why in kinds:
        rest = [i for i in np.argsort(-score, kind="stable").tolist() if i not in chosen]
        chosen |= dict.fromkeys(rest[:OF_EACH], why)
    # Few kinds apply to a run without rewards or mismatches: then more are drawn at random.
    rest = [i for i in drawn_at_random.tolist() if i not in chosen]
    chosen |= dict.fromkeys(rest[: max(0, 4 * OF_EACH - len(chosen))], "drawn at random")
    return [(int(ids[i]), why) for i, why in chosen.items()]


def _with_texts(run: Path, step: int, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the texts of prompts and tokens, where the run keeps them."""
    prompts = read_prompts(run, step)
    ids = {token["token_id"] for one in found for token in one["tokens"]}
    ids |= {int(i) for one in found for i in prompts.get(one["prompt"], ())}
    vocabulary = read_vocabulary(run, ids)
    for one in found:
        prompt = prompts.get(one["prompt"])
        if vocabulary is None:
            one["prompt_text"] = None
            continue
        one["prompt_text"] = None if prompt is None else printable(_joined(prompt, vocabulary))
        texts = as_texts([token["token_id"] for token in one["tokens"]], vocabulary)
        for token, text in zip(one["tokens"], texts, strict=True):
            token["text"] = printable(text)
    return found


def _joined(ids: np.ndarray, vocabulary: dict[int, bytes]) -> str:
    text = "".join(as_texts(ids.tolist(), vocabulary))
    if len(text) <= _MAX_PROMPT:
        return text
    return f"{text[: _MAX_PROMPT // 2]} […] {text[-_MAX_PROMPT // 2 :]}"


_MAX_PROMPT = 2000  # characters shown


def _gap(table: pa.Table) -> np.ndarray:
    """logp_old − logp_rollout ``[N]``, in float64; NaN where logp_old is null."""
    old, rollout = (table[name].to_numpy().astype(float) for name in ("logp_old", "logp_rollout"))
    return old - rollout


def _experts(
    run: Path, step: int, ids: Sequence[int]
) -> tuple[dict[tuple[int, int], np.ndarray], list[str]]:
    """Both sides' experts ``[2, L, K]`` by (sequence, position), where routes are logged.

    Also returned: for each file that was refused, why. Files are read one at a time and reduced to
    the requested sequences.
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
    """Reward, advantage and tokens of one sequence, by position.

    A token has no logp_old, ratio, gap or entropy where its source does not know them; None means
    that a value is not a number.
    """
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
        names = (
            "position",
            "token_id",
            "logp_rollout",
            "logp_old",
            "ratio",
            "advantage",
            "entropy",
        )
        values = {name: row[name] for name in names if row.get(name) is not None}
        if "logp_old" in values:
            values["gap"] = float(gap)
        tokens.append({k: finite(v) for k, v in values.items()} | {"layers": layers})
    first = table.slice(0, 1).to_pylist()[0]
    return {
        "prompt": first["prompt"],
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
    known = [token for token in first["tokens"] if "gap" in token]
    if any(token["gap"] is None for token in known):
        return (
            f"sequence {first['sequence']} of step {first['step']} holds a gap that is no number."
        )
    refused = "".join(f" Routes not readable: {reason}." for reason in first["routes_refused"])
    if not known:
        return (
            f"of step {first['step']} no log-probs at the old weights are known, so that there is "
            f"no gap.{refused}"
        )
    worst = max(known, key=lambda token: abs(token["gap"]))
    return (
        f"the largest |gap| shown of step {first['step']} is {number(abs(worst['gap']))} nats, at "
        f"position {worst['position']} of sequence {first['sequence']}, where "
        f"{len(worst['layers'])} of {first['num_layers']} MoE layers differ.{refused}"
    )


def drawn(token: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Prepare a token for the page: text, how full each colour is, its line, and its details."""
    lines = [
        f"position {token['position']}, token id {token['token_id']}"
        + (f": {token['text']!r}" if "text" in token else ""),
        f"log p: engine {_value(token, 'logp_rollout')}, trainer {_value(token, 'logp_old')}, "
        f"gap {_value(token, 'gap')}",
        f"ratio {_value(token, 'ratio')} at the last optimizer visit",
        f"advantage {_value(token, 'advantage')}"
        + (f", entropy {_value(token, 'entropy')} nats" if "entropy" in token else ""),
    ]
    for layer in token["layers"][:_MAX_LAYERS]:
        if "rollout" in layer:
            sides = (" ".join(map(str, layer[side])) for side in ("rollout", "train"))
            lines.append("layer {}: engine {} / trainer {}".format(layer["layer"], *sides))
        else:
            lines.append(f"layer {layer['layer']}: experts shared: {layer['shared']}")
    if (hidden := len(token["layers"]) - _MAX_LAYERS) > 0:
        lines.append(f"and {hidden} more layers")
    ratio, advantage = token.get("ratio"), token["advantage"]
    log_ratio = math.log(ratio) if ratio and ratio > 0 else None
    share = len(token["layers"]) / num_layers if num_layers else 0.0
    return {
        "text": token.get("text", token["token_id"]),
        "fills": {
            "gap": _log_fill(token["gap"]) if "gap" in token else 0.0,
            "mismatch": round(share, 2),
            "ratio": _log_fill(log_ratio) if "ratio" in token else 0.0,
            "entropy": round(min((token.get("entropy") or 0.0) / FULL_ENTROPY, 1.0), 2),
            "advantage": round(min(abs(advantage or 0.0) / FULL_ADVANTAGE, 1.0), 2),
        },
        "positive": (advantage or 0) > 0,
        "line": round(2 + 3 * share) if token["layers"] else 0,
        "about": "\n".join(lines),
    }


def _log_fill(value: float | None) -> float:
    """0..1 on a log scale; a value that is not a number is shown as the largest."""
    size = COLORED_TO if value is None else abs(value)
    size = min(max(size, COLORED_FROM), COLORED_TO)
    return round(math.log(size / COLORED_FROM) / math.log(COLORED_TO / COLORED_FROM), 2)


def strip(found: dict[str, Any], layer_ids: Sequence[int]) -> str:
    """The mismatched cells of token × layer as the path of an SVG, one unit each."""
    row_of = {layer: row for row, layer in enumerate(layer_ids)}
    return "".join(
        f"M{column} {row_of[layer['layer']]}h1v1h-1z"
        for column, token in enumerate(found["tokens"])
        for layer in token["layers"]
    )


def _value(token: dict[str, Any], name: str) -> str:
    if name not in token:
        return "not known"
    return "not finite" if token[name] is None else f"{token[name]:.4g}"
