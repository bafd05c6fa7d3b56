"""Tasks: problems with prompt ids, and verifiers."""

from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.tasks.base import Problem, Task

__all__ = ["ArithmeticTask", "Problem", "Task"]
