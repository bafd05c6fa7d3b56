"""Faults put into a running transformers engine, and the cause that should be named for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.hf import HFEngine, fp8_rounded, is_rounded
from moe_upgrpo.tools.diagnose import models


@dataclass(frozen=True, kw_only=True)
class EngineFault:
    """A fault, put into a sound engine. cause: the one to be named first; None: none should be."""

    inject: Callable[[HFEngine], Engine]
    cause: str | None
    dtype: str = "bfloat16"


class Wrapped:
    """An engine that is called through a wrapper: only the methods of `Engine` are visible.

    change: applied to each rollout. temperature: used for sampling, whatever is requested. before:
    tokens silently put in front of each prompt.
    """

    def __init__(
        self,
        engine: HFEngine,
        change: Callable[[Rollout], Rollout] | None = None,
        temperature: float | None = None,
        before: Sequence[int] = (),
    ):
        self._engine, self._change = engine, change
        self._temperature, self._before = temperature, before
        self.routes, self.update_weights = engine.routes, engine.update_weights
        self.close = engine.close

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    def generate(self, prompts, sampling: SamplingConfig, **options) -> list[Rollout]:
        if self._temperature is not None:
            sampling = replace(sampling, temperature=self._temperature)
        written = [np.concatenate([self._before, p]).astype(np.int64) for p in prompts]
        rollouts = self._engine.generate(written, sampling, **options)
        hidden = len(self._before)
        if hidden:
            rollouts = [
                replace(r, prompt_ids=r.prompt_ids[hidden:], routes=r.routes[hidden:])
                for r in rollouts
            ]
        return [self._change(r) for r in rollouts] if self._change else rollouts


def _tensors(wanted: Callable[[str], bool], change: Callable[[str, torch.Tensor], torch.Tensor]):
    """Change some tensors of the engine's model in place."""

    def inject(engine: HFEngine) -> HFEngine:
        generator = torch.manual_seed(5)
        changed = 0
        for name, tensor in engine.model.named_parameters():
            if wanted(name):
                tensor.data.copy_(change(name, tensor))
                changed += 1
        assert changed and generator is not None
        return engine

    return inject


def _moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor as some updates would."""
    return tensor + 0.3 * tensor.float().std() * torch.randn(tensor.shape)


def _made_anew(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor as a loader leaves one that it did not find."""
    return torch.randn(tensor.shape) * tensor.float().std()


def _in(layer: int, *parts: str) -> Callable[[str], bool]:
    return lambda name: f"layers.{layer}." in name and any(part in name for part in parts)


def _turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, dims=0)


def _everywhere(name: str) -> bool:
    return "norm" not in name


def _with(change: Callable[[torch.nn.Module], None]) -> Callable[[HFEngine], HFEngine]:
    def inject(engine: HFEngine) -> HFEngine:
        change(engine.model)
        return engine

    return inject


def _to_fp8(model: torch.nn.Module) -> None:
    for name, weight in model.named_parameters():
        if is_rounded(name, weight):
            weight.data.copy_(fp8_rounded(weight))


def _bf16_routers(model: torch.nn.Module) -> None:
    models.route_in(model, torch.bfloat16)


def _one_late(rollout: Rollout) -> Rollout:
    return replace(rollout, routes=np.roll(rollout.routes, 1, axis=0))


def _never_written(rollout: Rollout) -> Rollout:
    routes = rollout.routes.copy()
    routes[1::3] = 0
    return replace(rollout, routes=routes)


def _stale(engine: HFEngine) -> HFEngine:
    return _tensors(_everywhere, _moved)(engine)


ENGINE_FAULTS: dict[str, EngineFault] = {
    "older weights": EngineFault(inject=_stale, cause="stale-weights"),
    "older weights of an engine that shows none": EngineFault(
        inject=lambda engine: Wrapped(_stale(engine)), cause="stale-weights"
    ),
    "a layer that was not loaded": EngineFault(
        inject=_tensors(_in(1, "self_attn", "mlp"), _made_anew), cause="half-loaded-weights"
    ),
    "a layer that was not loaded, of an engine that shows none": EngineFault(
        inject=lambda engine: Wrapped(_tensors(_in(1, "self_attn", "mlp"), _made_anew)(engine)),
        cause="half-loaded-weights",
    ),
    "experts loaded in another order": EngineFault(
        inject=_tensors(_in(1, ".experts."), _turned), cause="experts-permuted"
    ),
    "experts and their router in another order": EngineFault(
        inject=_tensors(_in(1, ".experts.", ".gate."), _turned), cause="experts-permuted"
    ),
    "a head tied to the embedding": EngineFault(inject=_with(models.tie_head), cause="tied-head"),
    "a head tied to the embedding, of an engine that shows none": EngineFault(
        inject=lambda engine: Wrapped(_with(models.tie_head)(engine)), cause="tied-head"
    ),
    "another head": EngineFault(
        inject=_tensors(lambda name: name.startswith("lm_head"), _moved), cause="other-head"
    ),
    "weights rounded to FP8, unsaid": EngineFault(inject=_with(_to_fp8), cause="fp8"),
    "routers in bf16": EngineFault(
        inject=_with(_bf16_routers), cause="router-dtype", dtype="float32"
    ),
    "routers in bf16, of an engine that shows none": EngineFault(
        inject=lambda engine: Wrapped(_with(_bf16_routers)(engine)),
        cause="router-dtype",
        dtype="float32",
    ),
    "a temperature of its own": EngineFault(
        inject=lambda engine: Wrapped(engine, temperature=0.7), cause="other-temperature"
    ),
    "a token put before each prompt": EngineFault(
        inject=lambda engine: Wrapped(engine, before=(engine._eos_ids[0].item(),)),
        cause="other-tokens",
    ),
    "rows one late": EngineFault(
        inject=lambda engine: Wrapped(engine, _one_late), cause="row-off-by-one"
    ),
    "rows never written": EngineFault(
        inject=lambda engine: Wrapped(engine, _never_written), cause="zero-filled-rows"
    ),
}
CLEAN: dict[str, EngineFault] = {
    "bf16": EngineFault(inject=lambda engine: engine, cause=None),
    "bf16, of an engine that shows no tensors": EngineFault(inject=Wrapped, cause=None),
    "fp32": EngineFault(inject=lambda engine: engine, cause=None, dtype="float32"),
    "fp32, of an engine that shows no tensors": EngineFault(
        inject=Wrapped, cause=None, dtype="float32"
    ),
}


def options(model: Path, prompts: Path, **given) -> SimpleNamespace:
    """The options of `moe-upgrpo diagnose` with which a pair is started."""
    usual = {
        "trust_remote_code": False,
        "samples": 4,
        "max_new_tokens": 24,
        "temperature": 1.0,
        "seed": 0,
        "engine": "hf",
        "engine_url": None,
        "engine_dtype": "bfloat16",
        "dtype": "float32",
        "micro_batch": 64,
    }
    return SimpleNamespace(model=model, prompts=prompts, **usual | given)
