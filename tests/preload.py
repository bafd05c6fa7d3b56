"""What the fork server of tests/ranks.py imports once for all ranks of all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import moe_upgrpo.megatron.layout
import moe_upgrpo.megatron.model
import moe_upgrpo.megatron.weights  # noqa: F401
