# SPDX-License-Identifier: Apache-2.0
"""A model folder's config.json, read and written so that all readers find the same model in it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.folder import check_folder, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Never another machine's files, and never the folder's code: the classes are transformers' own.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def read_raw_config(folder: str | Path) -> dict[str, Any]:
    """Read config.json unchanged; UserError where it is not readable."""
    folder = check_folder(folder)
    try:
        raw = read_json(folder / "config.json")
        if not isinstance(raw, dict):
            raise UserError("it is not a JSON object.")
    except UserError as error:
        raise UserError(
            f"{folder} holds no config.json, or none that can be read: a Hugging Face checkpoint "
            f"folder is expected (config.json, *.safetensors, tokenizer files). {error}"
        ) from None
    return raw


def read_config(folder: str | Path) -> PretrainedConfig:
    """A model folder's config as transformers reads it.

    Raises UserError where transformers refuses it, and where two fields of it contradict each
    other: which one counts depends on the reader and its release.
    """
    from transformers import AutoConfig

    raw = read_raw_config(folder)
    if (Path(folder) / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json): transformers would put it on "
            "another model. Merge it into its base model and save that, or take the file out."
        )
    try:
        hf = AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # whatever its checks raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{folder}: transformers refuses its config.json: {' '.join(lines[:2])}"
        ) from None
    _check_consistent(folder, raw, hf)
    return hf


def _check_consistent(folder: str | Path, raw: dict[str, Any], hf: PretrainedConfig) -> None:
    """Raise UserError where two names of one field are given, and differ."""
    said = [
        ((one, raw[one]), (other, raw[other]))
        for one, other in hf.attribute_map.items()
        if one in raw and other in raw
    ]
    ropes = {n: raw[n] for n in ("rope_parameters", "rope_scaling") if isinstance(raw.get(n), dict)}
    thetas = [(f"{n}.rope_theta", r["rope_theta"]) for n, r in ropes.items() if "rope_theta" in r]
    if raw.get("rope_theta") is not None:
        thetas.append(("rope_theta", raw["rope_theta"]))
    said += pairwise(thetas)
    if "rope_parameters" in ropes and "rope_scaling" in raw:
        said.append(tuple((n, _scaling(raw[n])) for n in ("rope_parameters", "rope_scaling")))
    for (name, value), (other, other_value) in said:
        if value != other_value:
            raise UserError(
                f"{folder}: config.json says {name}={value} and {other}={other_value}, two names "
                "of one thing: readers disagree on which one counts. Make them equal."
            )


def _scaling(rope: dict[str, Any] | None) -> dict[str, Any]:
    """The scaling of positions, under transformers 5's names."""
    rope = rope or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":  # nothing is scaled, whatever else is set
        return {"rope_type": kind}
    others = ("rope_type", "type", "rope_theta")
    return {"rope_type": kind} | {n: v for n, v in rope.items() if n not in others}


def is_tied(hf: PretrainedConfig) -> bool:
    """Whether the output head is the embedding itself."""
    return bool(getattr(hf.get_text_config(), "tie_word_embeddings", False))


def eos_ids(folder: str | Path, hf: PretrainedConfig) -> list[int]:
    """The tokens that end a sequence; UserError where the folder names none."""
    from transformers import GenerationConfig

    ids = None
    if (Path(folder) / "generation_config.json").exists():
        try:
            ids = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        except Exception as error:  # whatever its checks raise
            raise UserError(
                f"{folder}: transformers refuses its generation_config.json: "
                f"{str(error).splitlines()[0]}"
            ) from None
    if ids is None:
        ids = hf.get_text_config().eos_token_id
    ids = [ids] if isinstance(ids, int) else ids
    if not ids:
        raise UserError(f"{folder} names no eos_token_id; set it in generation_config.json.")
    return list(ids)


def both_styles(hf: PretrainedConfig, dtype: str) -> dict[str, Any]:
    """config.json's fields under the names of transformers 4 and of transformers 5.

    transformers 5 writes the base of the rotary positions as rope_parameters.rope_theta, and the
    number of Qwen3's experts as num_local_experts. transformers 4 finds neither and silently takes
    its defaults: a base of 10,000, 128 experts.
    """
    config = hf.to_dict() | {"dtype": dtype, "torch_dtype": dtype}
    for old, new in hf.attribute_map.items():
        if new in config:
            config[old] = config[new]
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    # The folder's code is not copied, and not needed.
    auto_map = {
        n: v for n, v in (config.pop("auto_map", None) or {}).items() if n == "AutoTokenizer"
    }
    return config | ({"auto_map": auto_map} if auto_map else {})
