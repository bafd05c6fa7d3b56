"""A stack's modules without its checkout: of every hook in hooks.json a function of that name, in
that module, with that signature at a revision; and nothing else.

What such a function does the test says (`bodies`), as a function of the arguments by name; without
that it may not be called. So an integration that calls one otherwise than the revision allows, or
that looks for it elsewhere, fails here as it would there.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moe_upgrpo.integrations import hooks

# What a module of the stack imports from another by name, as the integration finds it there.
IMPORTED: dict[str, dict[str, list[str]]] = {
    "slime": {
        "slime.backends.megatron_utils.actor": [
            "slime.backends.megatron_utils.data:get_data_iterator",
            "slime.backends.megatron_utils.model:forward_only",
            "slime.backends.megatron_utils.model:train",
            "slime.utils.data:process_rollout_data",
        ],
        "slime.backends.megatron_utils.model": [
            "slime.backends.megatron_utils.loss:loss_function",
            "slime.backends.megatron_utils.data:get_batch",
        ],
        "slime.backends.megatron_utils.loss": [
            "slime.utils.ppo_utils:compute_policy_loss",
            "slime.backends.megatron_utils.cp_utils:all_gather_with_cp",
            "slime.backends.megatron_utils.cp_utils:get_sum_of_sample_mean",
        ],
    },
    "miles": {
        "miles.backends.megatron_utils.actor": [
            "miles.backends.training_utils.data:get_data_iterator",
            "miles.backends.megatron_utils.model:forward_only",
            "miles.backends.megatron_utils.model:train",
        ],
        "miles.backends.megatron_utils.model": [
            "miles.backends.training_utils.loss:loss_function",
            "miles.backends.training_utils.data:get_batch",
        ],
        "miles.backends.training_utils.loss_hub.losses": [
            "miles.backends.training_utils.loss_hub.logit_processors:get_log_probs_and_entropy",
            "miles.backends.training_utils.loss_hub.math_utils:compute_policy_loss",
            "miles.backends.training_utils.cp_utils:all_gather_with_cp",
        ],
    },
}
# Modules of the stack's utils that every revision has, and what is looked up there.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "slime": {"data": {"ray": types.SimpleNamespace(get=lambda shard: shard)}},
    "miles": {"data": {}},
}


@contextmanager
def installed(
    stack: str,
    revision: str,
    bodies: Mapping[str, Callable] | None = None,
    *,
    without: str = "",
    **attributes: Any,
) -> Iterator[types.ModuleType]:
    """Inside, the stack can be imported; gives our integration of it, imported anew.

    without: the name of a hook that this revision has lost. attributes: of the stack's utils, what
    is no function, `replay_base={"routing_replay_manager": ...}` say.
    """
    ours = f"moe_upgrpo.integrations.{stack}"
    before = dict(sys.modules)
    for name in before:
        if name == ours or name.split(".")[0] == stack:
            del sys.modules[name]
    try:
        for module, values in (OTHERS[stack] | attributes).items():
            vars(module_named(f"{stack}.utils.{module}")).update(values)
        for hook, about in hooks.read()[stack][revision].items():
            file, name = hook.split(":")
            if name != without:
                body = (bodies or {}).get(name, _not_called(name))
                put(module_of(file), name, about["signature"], body)
        for module, imported in IMPORTED[stack].items():
            for place in imported:
                source, name = place.split(":")
                if hasattr(source := module_named(source), name):
                    setattr(module_named(module), name, getattr(source, name))
        yield importlib.import_module(ours)
    finally:
        for name in set(sys.modules) - before.keys():
            if name == ours or name.split(".")[0] == stack:
                del sys.modules[name]
        sys.modules.update(before)
        package = importlib.import_module("moe_upgrpo.integrations")
        if ours in before:
            setattr(package, stack, before[ours])
        elif hasattr(package, stack):
            delattr(package, stack)


def module_of(file: str) -> types.ModuleType:
    return module_named(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def module_named(name: str) -> types.ModuleType:
    if name not in sys.modules:
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
        outer, _, last = name.rpartition(".")
        if outer:
            setattr(module_named(outer), last, module)
    return sys.modules[name]


def put(
    module: types.ModuleType, name: str, signature: str, body: Callable, names: dict | None = None
) -> None:
    """A function, or a method of a class that is made for it."""
    *outer, last = name.split(".")
    place: Any = module
    for part in outer:
        if not hasattr(place, part):
            setattr(place, part, type(part, (), {"__module__": module.__name__}))
        place = getattr(place, part)
    function = function_of(last, signature, body, names)
    setattr(place, last, staticmethod(function) if outer and signature == "()" else function)


def function_of(
    name: str, signature: str, body: Callable, names: dict[str, Any] | None = None
) -> Callable:
    """A function that takes what the signature allows, and hands it to `body` by name.

    names: its globals, if not its own.
    """
    found = {} if names is None else names
    key = f"__body_{len(found)}"  # of each one its own: methods of two classes may share a name
    tree = ast.parse(f"def {name}{signature}: return {key}(**locals())")
    for argument in ast.walk(tree):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    found[key] = body
    exec(compile(ast.fix_missing_locations(tree), f"<{name} of hooks.json>", "exec"), found)
    return found.pop(name)


def _not_called(name: str) -> Callable:
    def body(**_):
        raise AssertionError(f"{name} of the stack was called; the test gives it no body")

    return body
