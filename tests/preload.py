"""Imports that the fork server of tests/ranks.py makes once for all processes of all tests."""

import torch
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import moe_upgrpo.tools.plan
import moe_upgrpo.tools.probe
import moe_upgrpo.train.loop  # noqa: F401

torch.set_num_threads(1)
