# SPDX-License-Identifier: Apache-2.0
"""The options of `moe-upgrpo diagnose`, without what a diagnosis needs to run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.engines import check_engine
from moe_upgrpo.store.files import new_folder
from moe_upgrpo.train.parts import at_least

_WAYS = (
    "name a run folder (moe-upgrpo diagnose RUN), route dumps of the engine and the trainer "
    "(moe-upgrpo diagnose ENGINE.npy TRAINER.npy --num-experts E; --rollout-logp and --train-logp "
    "with them or alone), or a checkpoint (--model DIR --prompts FILE)"
)


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Say why a rollout engine and the trainer differ, and whether it is too much."""

    run: Annotated[Positional[Path | None], arg(metavar="[RUN|ENGINE.npy]")] = None
    """A run folder, of this trainer or of any stack with its routing log; or the engine's route
    dump, with the trainer's after it."""
    trainer: Annotated[Positional[Path | None], arg(metavar="[TRAINER.npy]")] = None
    """The trainer's route dump, after the engine's: the same as --rollout-routes and
    --train-routes."""
    model: Path | None = None
    """Hugging Face checkpoint folder with its tokenizer: docs/models.md."""
    trust_remote_code: bool = False
    """Run Python code of the model folder that its tokenizer needs."""
    prompts: Path | None = None
    """Text file, one prompt a line."""
    samples: int = 8
    """Responses to each prompt."""
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    engine: str = "hf"
    """Rollout engine: hf (transformers), vllm, sglang, or a plug-in's: docs/engines.md."""
    engine_url: str | None = None
    """A running server of the engine, http://HOST:PORT. None: started here."""
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    engine_weights: Literal["as-trained", "fp8"] = "as-trained"
    """fp8: the engine's matrices rounded to e4m3; engine hf."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the trainer."""
    micro_batch: int = 64
    minutes: float | None = None
    """Stop changing knobs of a checkpoint after so long. None: try them all."""
    rollout_routes: Path | None = None
    """Expert ids [tokens, layers, top-k] of the rollout, or of a batch [sequences, tokens, layers,
    top-k], as an .npy, .npz or torch file, and ..."""
    train_routes: Path | None = None
    """... of the trainer: row t of both belongs to the same token."""
    num_experts: int | None = None
    """Experts in each layer; needed with dumps of routes."""
    rollout_logp: Path | None = None
    """The engine's log-probs of the same tokens, [tokens] or [sequences, tokens]; NaN: none."""
    train_logp: Path | None = None
    """The trainer's."""
    dump_samples: int | None = None
    """Sequences of a dumped batch that answer the same prompt, one after the other. With it shares
    have intervals, which are by prompt."""
    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """The engine's precision, for what is expected. None: the run's or checkpoint's; of dumps
    bf16."""
    before: Path | None = None
    """diagnosis.json of an earlier diagnosis: say what the remedy taken since has removed."""
    contribute: Path | None = None
    """Append a checkpoint's measurement to FILE, as a row of the calibration table."""
    output_dir: Path | None = None
    """Where diagnosis.html and diagnosis.json go. None: the run's folder, else
    runs/diagnose-DATE-TIME."""

    def __post_init__(self):
        self._take_two_dumps()
        self._check_way()
        names = ("samples", "max_new_tokens", "micro_batch", "num_experts", "dump_samples")
        at_least(self, 1, *names)
        at_least(self, 0, "seed")
        check_engine(self.engine, url=self.engine_url)
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: above 0 is needed; at 0 nothing is sampled."
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UserError(f"minutes={self.minutes}: above 0 is needed.")

    @property
    def of_dumps(self) -> bool:
        """Whether dumps are diagnosed."""
        return any((self.rollout_routes, self.train_routes, self.rollout_logp, self.train_logp))

    @cached_property
    def folder(self) -> Path:
        """Where the diagnosis goes: a new folder, unless one is named or a run is diagnosed."""
        return self.output_dir or self.run or new_folder("diagnose")

    def _take_two_dumps(self) -> None:
        """Two files without options are the engine's and the trainer's routes."""
        engine, trainer = self.run, self.trainer
        if trainer is None:
            if engine is not None and engine.is_file():
                raise UserError(
                    f"{engine} is a file. For a run name its folder; for route dumps name both: "
                    "moe-upgrpo diagnose ENGINE.npy TRAINER.npy --num-experts E."
                )
            return
        if folders := [str(x) for x in (engine, trainer) if x.is_dir()]:
            raise UserError(
                f"{' and '.join(folders)}: a folder where a route dump is needed. One run folder "
                "is diagnosed at a time; to show several runs beside each other: moe-upgrpo "
                "report RUN RUN."
            )
        if self.of_dumps and (self.rollout_routes or self.train_routes):
            raise UserError(
                f"{engine} and {trainer} are routes of both sides, and --rollout-routes or "
                "--train-routes names others: leave one of the two out."
            )
        object.__setattr__(self, "run", None)
        object.__setattr__(self, "rollout_routes", engine)
        object.__setattr__(self, "train_routes", trainer)

    def _check_way(self) -> None:
        of_model = self.model is not None or self.prompts is not None
        ways = [self.run is not None, of_model, self.of_dumps]
        if sum(ways) != 1:
            what = "nothing to diagnose" if not any(ways) else "several things to diagnose"
            raise UserError(f"{what}: {_WAYS}.")
        if of_model and (self.model is None or self.prompts is None):
            lacking, why = (
                ("--model", "the checkpoint whose engine and trainer are compared")
                if self.model is None
                else ("--prompts", "a text file with one prompt a line, to sample from")
            )
            raise UserError(
                f"{lacking} is missing: {why}. Without it a run folder or dumps of both sides can "
                "still be diagnosed: moe-upgrpo diagnose RUN."
            )
        for name in ("routes", "logp"):
            given = [getattr(self, f"{side}_{name}") for side in ("rollout", "train")]
            if given.count(None) == 1:
                one, other = ("rollout", "train") if given[1] is None else ("train", "rollout")
                raise UserError(
                    f"--{one}-{name} is given without --{other}-{name}: two sides are compared."
                )
        if self.rollout_routes is not None and self.num_experts is None:
            raise UserError("--num-experts is missing: how many experts each layer has.")
        if self.dump_samples is not None and not self.of_dumps:
            raise UserError(
                "--dump-samples goes with dumps; a run or a checkpoint knows its groups."
            )
        for name in ("minutes", "contribute"):
            if getattr(self, name) is not None and not of_model:
                raise UserError(f"--{name} goes with a checkpoint: --model DIR --prompts FILE.")
