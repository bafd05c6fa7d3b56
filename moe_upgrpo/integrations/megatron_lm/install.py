# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""The functions of Megatron-LM's `rl_utils` with the loss and the log around them.

An import puts them there, where the environment asks for a loss or a log (see `settings`).
"""

import functools
import inspect

from moe_upgrpo.integrations.kit import environment, revisions

revisions.check("megatron-lm", "log" if environment.run_folder() else "loss")

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.rl import rl_utils
from megatron.training import get_args, global_vars
from torch import Tensor

from moe_upgrpo.integrations.megatron_lm.loss import Counts, Terms, evaluate
from moe_upgrpo.integrations.megatron_lm.settings import asked, check, with_clamps
from moe_upgrpo.losses import PolicyLossConfig


class Hooks:
    """Wrappers around the functions of `rl_utils`."""

    def __init__(self, config: PolicyLossConfig | None, settings: set[str], log=None):
        self.config, self.settings, self.log = config, settings, log
        self.counts: Counts | None = None
        self.rows: tuple | None = None

    def calculate_grpo_loss(self, *, loss_mask: Tensor, tokens: Tensor, **given) -> Terms:
        """Called by the patched train_rl.py for every micro-batch of the update."""
        config = self.config
        if config is not None:
            clamps = {"clip_low": given["clamp_eps_lower"], "clip_high": given["clamp_eps_upper"]}
            config = with_clamps(config, self.settings, **clamps)
        terms, _ = evaluate(given, loss_mask, config, self.counts)
        if self.log is not None:
            self.log.see(given, loss_mask, tokens, config, self.counts)
        return terms

    def install(self) -> None:
        prepare, trajectories = rl_utils.prepare_data_for_update, rl_utils.prepare_trajectories
        set_args = global_vars.set_args

        @functools.wraps(set_args)
        def checked_args(args):
            # The first that Megatron-LM does with them: before a model is built.
            check(args, self.config, self.settings, log=self.log is not None)
            set_args(args)

        @functools.wraps(trajectories)
        def prepare_trajectories(rows, *args, **kwargs):
            made = trajectories(rows, *args, **kwargs)
            self.rows = rows, *made[:2]
            return made

        @functools.wraps(prepare)
        def prepare_data_for_update(*args, **kwargs):
            bound = inspect.signature(prepare).bind(*args, **kwargs).arguments
            if self.log is not None:
                self.log.begin(bound["model"], bound["rollouts"], bound["request_ledger"])
            result = prepare(*args, **kwargs)
            packed = rl_utils.get_rl_runtime_state().packing_context
            rows, trajs, generated = self.rows
            if packed is None:
                mask = (generated & (trajs != bound["tokenizer"].pad))[:, 1:]
                tokens, sampled = mask.sum(), mask.any(dim=1)
                micro_batches = len(rows) / get_args().micro_batch_size
            else:
                mine = [i for bin_ in packed.packing_info.bin_seq_indices for i in bin_]
                tokens = packed.packed_loss_mask[:, 1:].sum()
                sampled = packed.original_generation_masks[mine][:, 1:].any(dim=1)
                micro_batches = len(packed.packed_trajs)
            here = (tokens, sampled.sum(), micro_batches)
            total = torch.tensor([float(x) for x in here], dtype=torch.float64).cuda()
            dist.all_reduce(total, group=mpu.get_data_parallel_group())
            self.counts = Counts(*total.tolist())
            if self.log is not None:
                self.log.collected(rows, trajs, packed)
            return result

        global_vars.set_args = checked_args
        rl_utils.prepare_trajectories = prepare_trajectories
        rl_utils.prepare_data_for_update = prepare_data_for_update


_config, _named = asked()
_log = None
if environment.run_folder() is not None:
    from moe_upgrpo.integrations.megatron_lm.log import CollectionLog

    _log = CollectionLog(environment.run_folder())
hooks = Hooks(_config, _named, _log)
if _config is not None or _log is not None:
    hooks.install()
calculate_grpo_loss = hooks.calculate_grpo_loss
