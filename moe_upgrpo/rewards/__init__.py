# SPDX-License-Identifier: Apache-2.0
"""Rewards of a response: built-in ones by name, your own by module:function, each in processes.

Nothing here knows of tokens, models or torch: a worker process imports it in a few milliseconds.
"""

from moe_upgrpo.rewards.named import REWARDS, Reward, read_rewards, register_reward
from moe_upgrpo.rewards.question import Question
from moe_upgrpo.rewards.workers import Outcome, Workers

__all__ = [
    "REWARDS",
    "Outcome",
    "Question",
    "Reward",
    "Workers",
    "read_rewards",
    "register_reward",
]
