# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's own options, `--megatron.NAME VALUE`: checked, and split by config.

`passed_fields` says how each field is treated; this module reads values by the fields' types in the
installed release. A name that several of the three configs have is set in all of them, as
Megatron-LM's own arguments are.
"""

from __future__ import annotations

import enum
import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig
from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import backend, passed_fields, releases
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import transformer_config
from moe_upgrpo.megatron.optimizer import ddp_config, optimizer_config
from moe_upgrpo.megatron.settings import OptimizerSettings

_CONFIGS = {
    "transformer": MLATransformerConfig,  # has the fields of TransformerConfig, and more
    "optimizer": OptimizerConfig,
    "ddp": DistributedDataParallelConfig,
}
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "uint8": torch.uint8,
    "fp8": torch.uint8,
}
_OFFLOAD = "optimizer_cpu_offload"


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """Values for fields of each of Megatron-Core's configs."""

    transformer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)

    @property
    def overlaps_gather(self) -> bool:
        """Whether weights are gathered by the forward after an optimizer step, not by the step."""
        return bool(self.ddp.get("overlap_param_gather"))


def read(given: Mapping[str, str], *, here: bool = True) -> Passed:
    """Read the options, refusing those that cannot be set. `here`: to run on this machine."""
    values = {name: _checked(name, text, here) for name, text in given.items()}
    _check_together(values)
    if values.get(_OFFLOAD):
        # As Megatron-LM's own arguments do; Megatron-Core's default is to offload nothing.
        values = {"optimizer_offload_fraction": 1.0} | values
    split: dict[str, dict[str, Any]] = {name: {} for name in _CONFIGS}
    for config, cls in _CONFIGS.items():
        known = {one.name for one in fields(cls)}
        split[config] |= {name: value for name, value in values.items() if name in known}
    return Passed(**split)


def check(
    given: Mapping[str, str],
    hf: PretrainedConfig,
    layout: Layout,
    *,
    dtype: str,
    recompute: str,
    optimizer: OptimizerSettings,
    here: bool = True,
) -> None:
    """Raise UserError for whatever `read` or Megatron-Core's configs refuse."""
    passed = read(given, here=here)
    check_optimizer(passed, optimizer)
    with backend.apply(), told(given):
        config = transformer_config(
            hf, layout, getattr(torch, dtype), recompute, passed.transformer
        )
        optimizer_config(config, optimizer, passed.optimizer)
        ddp_config(optimizer, passed.ddp)


def check_optimizer(passed: Passed, settings: OptimizerSettings) -> None:
    """Raise UserError where an option needs Adam, whose state is split, with SGD as optimizer."""
    if settings.splits_state:
        return
    for values in (passed.ddp, passed.optimizer):
        for name in ("overlap_param_gather", _OFFLOAD, "use_precision_aware_optimizer"):
            if values.get(name):
                raise _error(
                    name, "it is for --optimizer.algorithm adam, whose state the ranks share."
                )


@contextmanager
def told(given: Mapping[str, str]) -> Iterator[None]:
    """Turn a refusal of Megatron-Core's configs into a UserError where options were passed."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        if not given:
            raise
        options = " ".join(f"--megatron.{name} {value}" for name, value in given.items())
        raise UserError(
            f"Megatron-Core {releases.installed()} refuses {options}, beside what this run sets: "
            f"{str(error).strip() or type(error).__name__}. Change these options or leave them out."
        ) from error


def _error(name: str, why: str) -> UserError:
    return UserError(f"--megatron.{name}: {why}")


def _types() -> dict[str, Any]:
    """The type of every field of the three configs; where several have a name, they agree."""
    found: dict[str, Any] = {}
    for cls in _CONFIGS.values():
        hints = get_type_hints(cls)
        found |= {one.name: hints[one.name] for one in fields(cls)}
    return found


def _checked(name: str, text: str, here: bool) -> Any:
    kinds = _types()
    if ours := passed_fields.found_in(passed_fields.OURS, name):
        raise _error(name, f"this is set by {ours}. Give that option.")
    if why := passed_fields.found_in(passed_fields.REFUSED, name):
        raise _error(name, f"refused: {why}. Leave it out.")
    if name not in kinds:
        other = passed_fields.found_in(passed_fields.PASSED, name) is not None
        what = "has it in other releases only" if other else "has no such option"
        near = get_close_matches(name, kinds, n=1)
        raise _error(
            name,
            f"Megatron-Core {releases.installed()} {what}"
            + (f"; the nearest is {near[0]}" if near and not other else "")
            + ". docs/scale.md lists what can be passed.",
        )
    if passed_fields.found_in(passed_fields.PASSED, name) is None:
        raise _error(
            name,
            f"an option of Megatron-Core {releases.installed()} that nobody has looked at yet: "
            "whether it breaks recording, replay or the loss is not known. Leave it out.",
        )
    value = _value(name, kinds[name], text)
    _check_range(name, value)
    needs = passed_fields.found_in(passed_fields.NEEDS, name)
    flex = name == "moe_token_dispatcher_type"
    if flex and value != "flex":
        raise _error(name, f"{value} is set by --dispatcher; flex is what can be passed here.")
    if here and (needs or flex) and value not in (False, None) and not _has(needs):
        raise _error(
            name,
            f"{text} needs {needs or passed_fields.CUDA}, which this machine has not. Leave it "
            "out here; moe-upgrpo doctor says what is installed.",
        )
    return value


def _has(needs: str | None) -> bool:
    te = needs != passed_fields.TE or gpt_layer_specs.HAVE_TE
    return backend.has_cuda() and te


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if value < 0 or not math.isfinite(value):
        raise _error(name, f"{value}: a number of at least 0 is needed.")
    if name.endswith("_fraction") and value > 1:
        raise _error(name, f"{value}: a share between 0 and 1 is needed.")
    if name == "bucket_size" and value < 1:
        raise _error(name, f"{value}: at least 1 is needed.")


def _check_together(values: Mapping[str, Any]) -> None:
    if values.get("overlap_param_gather") and not values.get("overlap_grad_reduce"):
        raise _error(
            "overlap_param_gather",
            "it goes with --megatron.overlap_grad_reduce true, which makes the parts that are "
            "gathered one after the other. Give both.",
        )
    offload = bool(values.get(_OFFLOAD))
    of_offload = (
        "optimizer_offload_fraction",
        "use_torch_optimizer_for_cpu_offload",
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_grads",
        "pin_cpu_params",
    )
    for name in of_offload:
        if name in values and not offload:
            raise _error(name, f"it does nothing without --megatron.{_OFFLOAD} true. Give both.")
    precise = "use_precision_aware_optimizer"
    if offload and precise in values:
        raise _error(precise, f"--megatron.{_OFFLOAD} decides on it. Leave it out.")


def _value(name: str, kind: Any, text: str) -> Any:
    """The value of a field of type `kind`; UserError that says what the type takes."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        data = text
    found = _typed(kind, data, str(text))
    if found is _WRONG:
        raise _error(name, f"{text!r} is not {_said(kind)}.")
    return found


_WRONG = object()


def _typed(kind: Any, data: Any, text: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = (_typed(one, data, text) for one in inner)
        return next((one for one in found if one is not _WRONG), _WRONG)
    if origin is Literal:
        return next((one for one in inner if str(one) == text), _WRONG)
    if origin in (list, tuple):
        if not isinstance(data, list):
            return _WRONG
        found = [_typed(inner[0], one, str(one)) for one in data]
        return _WRONG if _WRONG in found else origin(found)
    if kind is type(None):
        return None if data is None or text.lower() == "none" else _WRONG
    if kind is bool:
        return data if isinstance(data, bool) else _WRONG
    if kind is int:
        return data if type(data) is int else _WRONG
    if kind is float:
        return _number(text) if not isinstance(data, bool) else _WRONG
    if kind is str:
        return text
    if kind is torch.dtype:
        return _DTYPES.get(text.removeprefix("torch."), _WRONG)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind.__members__.get(text, _WRONG)
    return _WRONG


def _number(text: str) -> Any:
    try:
        return float(text)  # YAML reads 1e-4 as a word
    except ValueError:
        return _WRONG


def _said(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        return f"a list, [A, B], of which each is {_said(inner[0])}"
    if kind is torch.dtype:
        return f"one of {', '.join(_DTYPES)}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(kind.__members__)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return words.get(kind, "null")
