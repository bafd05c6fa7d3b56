# SPDX-License-Identifier: Apache-2.0
"""Tasks: problems with prompt ids, and verifiers."""

from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.tasks.base import Problem, Task, Verdict, judged
from moe_upgrpo.tasks.math_task import MathTask
from moe_upgrpo.tasks.named import register_task

__all__ = ["ArithmeticTask", "MathTask", "Problem", "Task", "Verdict", "judged", "register_task"]
