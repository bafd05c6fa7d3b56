"""Tasks: problems with prompt ids, and verifiers."""

from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.tasks.base import Problem, Task
from moe_upgrpo.tasks.math_task import MathTask

__all__ = ["ArithmeticTask", "MathTask", "Problem", "Task"]
