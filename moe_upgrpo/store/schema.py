# SPDX-License-Identifier: Apache-2.0
"""The token log's schema: its columns, its levels, and what each file says about its model.

L MoE layers, K experts per token (top-k), S and S′ the expert sets of the engine and the trainer.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from moe_upgrpo.errors import UserError

SCHEMA_VERSION = 3
# Version 1 has only the columns that are not optional, and no level: its files are full. Up to
# version 2, files carry no checksums.
READABLE_VERSIONS = (1, 2, 3)


@dataclass(frozen=True)
class Column:
    """``type`` is Arrow's; L and B in it depend on the model. An optional one may hold nulls.

    nullable: always present, and null where the source made no forward that could tell.
    """

    type: str
    meaning: str
    optional: bool = False
    nullable: bool = False


# Every column of the current version, in the order of the file.
COLUMNS: dict[str, Column] = {
    "step": Column("int32", "training step, from 1"),
    "sequence": Column("int64", "index of the sequence within the step, counted over all ranks"),
    "prompt": Column("int32", "index of the prompt (the group) within the step"),
    "position": Column("int32", "position p in prompt + response; its route row is p − 1"),
    "token_id": Column("int32", "the sampled token"),
    "reward": Column("float", "reward of the sequence"),
    "advantage": Column("float", "advantage of the token"),
    "logp_rollout": Column("float", "the engine's log-prob, at the sampling temperature"),
    "logp_old": Column(
        "float", "the trainer's log-prob at the weights the engine held", nullable=True
    ),
    "logp_train": Column("float", "the trainer's log-prob at the token's last optimizer visit"),
    "ratio": Column("float", "exp(logp_train − logp_old), of that visit", nullable=True),
    "clipped": Column("bool", "the loss's own rule took the gradient away at that visit"),
    "layers_mismatched": Column("int16", "MoE layers with overlap < K, free-running, old weights"),
    "overlap": Column(
        "fixed_size_list<uint8>[L]", "|S ∩ S′| of each MoE layer; no such column if dense"
    ),
    "rollout_experts": Column(
        "fixed_size_binary[B]",
        "S of every MoE layer at route row p − 1, packed; `read_routes` unpacks",
        optional=True,
    ),
    "train_experts": Column(
        "large_binary",
        "S′ of every MoE layer, native routes at the old weights, as a difference from S; empty "
        "where all layers agree",
        optional=True,
    ),
    "staleness": Column(
        "int32",
        "RL steps between the weights that sampled the token and the old weights θ_old: it is of "
        "weight version step − 1 − staleness",
        optional=True,
    ),
    "prefix_mismatched": Column(
        "int32",
        "(route row, MoE layer) pairs with S ≠ S′ in rows 0..p − 2, the prompt's included",
        optional=True,
    ),
    "margin_min": Column(
        "float",
        "smallest top-k margin s_(K) − s_(K+1) over the MoE layers, the trainer's, old weights",
        optional=True,
    ),
    "layers_mismatched_conditional": Column(
        "int16",
        "MoE layers whose own top-k differs from S in a forward held to S, old weights: flips of "
        "that layer alone",
        optional=True,
    ),
    "gap_numerics": Column(
        "float",
        "L(θ_old, e) − μ of the decomposition; the gap columns that a row has add up to "
        "logp_train − logp_rollout",
        optional=True,
    ),
    "gap_staleness": Column(
        "float",
        "L(θ_old, e) − L(θ_engine, e) where the engine sampled with older weights than θ_old; "
        "gap_numerics is then L(θ_engine, e) − μ",
        optional=True,
    ),
    "gap_engine_routing": Column(
        "float", "L(θ_old, native) − L(θ_old, e); none under R3", optional=True
    ),
    "gap_update": Column(
        "float",
        "L(θ, n(θ_old)) − L(θ_old, native); under R3 L(θ, e) − L(θ_old, e)",
        optional=True,
    ),
    "gap_routing_shift": Column(
        "float", "L(θ, native) − L(θ, n(θ_old)); none under R2 and R3", optional=True
    ),
    "counterfactual_engine_routing": Column(
        "float",
        "under R3, what the loss does not see: L(θ_old, native) − L(θ_old, e)",
        optional=True,
    ),
    "counterfactual_routing_shift": Column(
        "float",
        "under R2, what the loss does not see: L(θ, native) − L(θ, n(θ_old))",
        optional=True,
    ),
    **{
        f"noise_{side}_{kind}": Column(
            "int16",
            f"MoE layers that differ between two passes of the {side}: {what}",
            optional=True,
        )
        for side, kind, what in (
            ("trainer", "repeat", "the same forward twice"),
            ("trainer", "batch_shape", "other neighbours, padding and sizes"),
            ("engine", "repeat", "the same pass twice"),
            ("engine", "batch_shape", "sampling against one pass over the whole sequence"),
        )
    },
    "gradient_weight": Column(
        "float",
        "|A| · c · w at the last visit: c the loss's coefficient of ∇log π, w its aggregation's "
        "weight of the token",
        optional=True,
    ),
    "entropy": Column(
        "float", "−Σ_v π(v) log π(v) in nats, the trainer's, old weights", optional=True
    ),
}

LEVELS = {
    "full": "every sequence",
    "sampled": "whole sequences, chosen by a hash of (step, sequence); the metadata has the share",
    "aggregate": "no token rows: metrics.jsonl alone",
}

_METADATA_KEY = b"moe_upgrpo.token_log"


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The model whose routes a token log holds; kept in each file's schema metadata."""

    layer_ids: tuple[int, ...]
    top_k: int
    num_experts: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_ids", tuple(int(i) for i in self.layer_ids))
        if len(set(self.layer_ids)) != len(self.layer_ids):
            raise UserError(f"layer_ids must differ from each other, got {list(self.layer_ids)}")
        if self.layer_ids and not 1 <= self.top_k <= min(self.num_experts, 255):
            raise UserError(
                f"top_k must be in 1..min(num_experts, 255), got top_k={self.top_k} and "
                f"num_experts={self.num_experts}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @classmethod
    def of(cls, schema: pa.Schema) -> "TokenLayout":
        """The layout that a file or a table from `read_tokens` carries.

        Raises:
            UserError: not a token log, or of a schema version that this package does not know.
        """
        about = metadata(schema)
        return cls(
            layer_ids=tuple(about["layer_ids"]),
            top_k=about["top_k"],
            num_experts=about["num_experts"],
        )


def metadata(schema: pa.Schema) -> dict[str, Any]:
    """The metadata ``moe_upgrpo.token_log``, in the form of the current version.

    Raises:
        UserError: not a token log, or of a schema version that this package does not know.
    """
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise UserError("not a token log: its schema lacks the moe_upgrpo.token_log metadata")
    about = json.loads(raw)
    if about.get("schema_version") not in READABLE_VERSIONS:
        raise UserError(
            f"schema version {about.get('schema_version')} is unknown: this package reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}. Read it with the moe_upgrpo that wrote it"
        )
    return {"level": "full", "share": 1.0} | about | {"schema_version": SCHEMA_VERSION}


def file_metadata(layout: TokenLayout, sampling: dict[str, Any]) -> dict[bytes, str]:
    """The metadata of a file: JSON of the version, ``sampling`` (level and share) and the model."""
    about = {"schema_version": SCHEMA_VERSION} | sampling
    return {_METADATA_KEY: json.dumps(about | {"num_layers": layout.num_layers} | asdict(layout))}


def check_types(schema: pa.Schema, layout: TokenLayout) -> None:
    """Raise UserError where a column of `COLUMNS` is missing or of another type."""
    for name, column in COLUMNS.items():
        if name not in schema.names:
            if column.optional or (name == "overlap" and not layout.num_layers):
                continue
            raise UserError(f"it lacks the column {name}, {column.type}")
        kind = schema.field(name).type
        if name == "overlap":
            fits = (
                pa.types.is_fixed_size_list(kind)
                and (kind.list_size, kind.value_type) == (layout.num_layers, pa.uint8())
            )  # fmt: skip
        elif name == "rollout_experts":
            fits = pa.types.is_fixed_size_binary(kind)
        else:
            fits = kind == pa.type_for_alias(column.type)
        if not fits:
            raise UserError(f"its column {name} is {kind}, expected {column.type}")
