"""What the fork server of tests/ranks.py imports once for all ranks of all tests."""

import torch

import moe_upgrpo.megatron.actor  # noqa: F401

torch.set_num_threads(1)
