# SPDX-License-Identifier: Apache-2.0
"""Options of a run from YAML files, a run folder and the command line, as command-line words.

tyro reads the words, and reports a wrong value, whichever way the value came.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import passed_fields
from moe_upgrpo.rewards.named import is_own_code
from moe_upgrpo.train.config import OPTIONS, TrainConfig
from moe_upgrpo.train.passed_words import as_words

T = TypeVar("T")

# Settings that may be given anew where a run is resumed: they say where it is computed, how far it
# goes and how it is watched. All others say what the run is.
MAY_CHANGE = {
    "steps": "a run goes on where it ended; fewer than are done is refused",
    "tp": "the layout, and with it the number of ranks: checkpoints are of the whole model",
    "cp": "the layout",
    "ep": "the layout",
    "etp": "the layout",
    "pp": "the layout",
    "vpp": "the layout",
    "dispatcher": "how experts are reached",
    "recompute": "memory",
    "megatron": "of its options those about memory and communication: [scale.md](scale.md)",
    "micro_batch": "memory",
    "micro_batch_tokens": "memory, and how evenly ranks work",
    "packing": "memory and time",
    "vllm": "memory",
    "engine_url": "where the engine is; which engine it is may not change",
    "engine_transfer": "how the engine gets its weights",
    "engine_lost": "what happens where a server falls away",
    "cache_dir": "not used any more: the start model is there",
    "max_refills": "how long a step looks for groups",
    "starve_after": "how long a step waits for its batch",
    "starved": "what follows then",
    "reward_timeout": "how long a reward may take",
    "reward_workers": "how many processes judge",
    "eval_data": "evaluation",
    "eval_every": "evaluation",
    "eval_samples": "evaluation",
    "eval_problems": "evaluation",
    "reference_kl": "a measurement, and the memory of a second model",
    "track": "how the run is watched",
    "alarm": "how the run is watched",
    "save_every": "checkpoints",
    "keep": "checkpoints",
    "async_save": "checkpoints",
    "deterministic": "which kernels compute on a GPU",
    "timeout": "how long ranks wait for each other",
    "stop_within": "how long a signal waits for a checkpoint",
    "report": "how the run is watched",
}
# Only for the command line.
_OF_THE_START = ("config", "resume", "restart")
# The folder, the sources of the options, and permissions on this machine.
_NO_SETTINGS = (*_OF_THE_START, "output_dir", "trust_remote_code")


def changes(stored: dict[str, Any], config: TrainConfig) -> dict[str, list]:
    """Setting -> [the run's value, the value now] for the changes of a resumed run.

    `stored` is the run's config.json; a setting that is not in it had its default. Raises UserError
    naming both values of a setting that may not change.
    """
    output_dir, run = config.run.output_dir, config.run.resume
    if output_dir is not None and output_dir.resolve() != run.resolve():
        raise UserError(
            f"--output-dir {output_dir} with --resume {run}: a run is continued in its own folder. "
            "Leave --output-dir out."
        )
    now, before = dict(_settings(config.flat())), dict(_settings(stored))
    before = dict(_settings(TrainConfig().flat())) | before
    changed = {n: [before.get(n), v] for n, v in now.items() if before.get(n) != v}
    wrong = [name for name in changed if not _may_change(name)]
    if wrong:
        values = "; ".join(f"{n} was {changed[n][0]}, now {changed[n][1]}" for n in wrong)
        raise UserError(
            f"--resume {run}: {values}. That would be another run: leave the option out, "
            f"or start one with another --output-dir. May change: {', '.join(MAY_CHANGE)}."
        )
    return changed


def _may_change(setting: str) -> bool:
    group, _, name = setting.partition(".")
    return group in MAY_CHANGE and (group != "megatron" or passed_fields.may_change(name))


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value as JSON has it) of the settings among `values`."""
    known = OPTIONS.keys() - {*_NO_SETTINGS}
    for name, value in values.items():
        if not prefix and name not in known:
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield prefix + name, [str(v) if isinstance(v, Path) else v for v in value]
        else:
            yield prefix + name, str(value) if isinstance(value, Path) else value


_PACKED = "here it is packing, which goes with micro_batch or micro_batch_tokens."
_BUDGET = (
    "here it is micro_batch_tokens N, a budget of each micro-batch; packing leaves padding out."
)
# Options by the names that Megatron-LM, verl, slime and NeMo-RL give them.
NOT_SUPPORTED = {
    "context_parallel_size": "here it is cp.",
    "packed_sequences": _PACKED,
    "sequence_packing": _PACKED,
    "use_remove_padding": _PACKED,
    "use_dynamic_batch_size": _BUDGET,
}


def check_supported(arguments: Sequence[str]) -> None:
    """Raise UserError for options of other stacks that this one lacks."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in NOT_SUPPORTED:
            raise UserError(f"{argument}: {NOT_SUPPORTED[name]}")


def named(option: str, arguments: Sequence[str]) -> list[Path]:
    """The paths of every `OPTION PATH` and `OPTION=PATH` among command line arguments."""
    paths = []
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == option and (value or arguments[i + 1 :]):
            paths.append(Path(value or arguments[i + 1]))
    return paths


def run_arguments(path: Path) -> list[str]:
    """The settings of a run folder as the command line would have them; see `file_arguments`."""
    from moe_upgrpo.store import read_config  # here: it brings pyarrow

    default = dict(_settings(TrainConfig().flat()))
    return [
        word
        for name, value in _settings(read_config(path))
        # None is the default of most settings that can be None; for the others it is a value.
        if value is not None or default.get(name) is not None
        for word in _option(name, value)
    ]


def check_own_code(run: Path, words: Sequence[str]) -> None:
    """Raise UserError where a resumed run names code that the words do not name again.

    A run folder may be somebody else's: its settings are followed, but none of its code is run.
    """
    from moe_upgrpo.store import read_config

    stored = read_config(run)
    rewards = [str(word) for word in stored.get("reward") or ()]
    own = {
        "reward": rewards if any(is_own_code(word) for word in rewards) else [],
        "task": [str(stored["task"])] if ":" in str(stored.get("task") or "") else [],
    }
    given = {word.partition("=")[0] for word in words}
    for option, values in own.items():
        if values and f"--{option}" not in given:
            raise UserError(
                f"--resume {run}: its {option} is code, {' '.join(values)}, and code that a run "
                f"folder names is not run unasked. Give --{option} {' '.join(values)} again."
            )


def mapping_arguments(values: dict[str, Any]) -> list[str]:
    """Options as the command line would have them, from a mapping such as `file_arguments` reads.

    Raises UserError where a field is not known.
    """
    known = {name: option for name, option in OPTIONS.items() if name not in _OF_THE_START}
    return list(_flatten(values, known, prefix=""))


def file_arguments(path: Path) -> list[str]:
    """The options in a YAML (or JSON) file as the command line would have them.

    `optimizer: {lr: 3.0e-4}` becomes `--optimizer.lr 3.0e-4`: values are read, and mistakes
    reported, as on the command line, whose own options come after and win.

    Raises UserError, which names the file: it cannot be read, or a field is not known (the nearest
    one is named) or occurs twice.
    """
    needed = "lines of `option: value`"
    return read_yaml(path, mapping_arguments, named=f"--config {path}", needed=needed)


def read_yaml(path: Path, make: Callable[[dict], T], *, named: str, needed: str) -> T:
    """Read the mapping in a YAML (or JSON) file and pass it to `make`.

    Raises UserError that begins with `named`: the file cannot be read, holds no mapping (`needed`
    says of what) or a field twice, or `make` refuses it.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if not isinstance(values, dict):
            raise UserError(f"{needed} are needed.")
        return make(values)
    except OSError as error:
        raise UserError(f"{named}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{named} is not YAML: {error}") from None
    except UserError as error:
        raise UserError(f"{named}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate fields, where the last would silently win."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{name!r} stands in line {lines[name]} and in line {line}.")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _flatten(values: dict, known: dict[str, Field], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(_unknown(f"{prefix}{name}"))
        made_by = known[name].default_factory
        group = {f.name: f for f in fields(made_by)} if is_dataclass(made_by) else None
        if group and not isinstance(value, dict):
            raise UserError(
                f"{prefix}{name} is {value!r}; it is a group of the fields {', '.join(group)}."
            )
        if made_by is dict:
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name} is {value!r}; lines of `name: value` are needed.")
            for inner, of_inner in value.items():
                yield from as_words(inner, of_inner)
        elif group:
            yield from _flatten(value, group, f"{prefix}{name}.")
        else:
            as_text = json.dumps(value) if isinstance(value, dict) else value
            yield from _option(f"{prefix}{name}", as_text)


def _unknown(given: str) -> str:
    if given in NOT_SUPPORTED:
        return f"{given}: {NOT_SUPPORTED[given]}"
    names = [*OPTIONS]
    for option in OPTIONS.values():
        if is_dataclass(option.default_factory):
            names += [f"{option.name}.{inner.name}" for inner in fields(option.default_factory)]
    # `lr` at the top is optimizer.lr.
    near = [name for name in names if name.split(".")[-1] == given.split(".")[-1]]
    near = near or get_close_matches(given, names, n=1)
    if given in names:
        return f"{given} is an option of the command line only."
    return f"{given!r} is not a field" + (f"; {near[0]!r} is." if near else ".")


def _option(name: str, value: Any) -> list[str]:
    if name.startswith("megatron."):
        return as_words(name.partition(".")[2], value)
    *outer, last = name.replace("_", "-").split(".")
    if isinstance(value, bool) and outer != ["policy"]:  # whose options all have a value
        return ["--" + ".".join([*outer, last if value else f"no-{last}"])]
    option = "--" + ".".join([*outer, last])
    # With "=" a value may begin with a dash.
    return [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
