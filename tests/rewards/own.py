"""Rewards as a user writes them, and as they go wrong; imported by worker processes."""

import asyncio
import os
import time


def half(problem, response, row):
    """A number, whatever `response` says of how it goes."""
    if response == "raises":
        raise KeyError("no such answer")
    if response == "hangs":
        time.sleep(60)
    if response == "dies":
        os._exit(7)
    odd = {"nan": float("nan"), "infinite": float("inf"), "text": "0.5", "none": None}
    odd |= {"two": [0.5, 0.5], "empty": {}, "nested": {"score": [1.0]}}
    if response in odd:
        return odd[response]
    print("printed by a reward")
    return 0.5 * float(response == problem.answer) + row.get("bonus", 0)


def named(problem, response, row):
    return {"score": 2.0 * len(response), "acc": response == problem.answer, "length": 3}


async def later(problem, response, row):
    await asyncio.sleep(60 if response == "hangs" else 0.2)
    return float(response == problem.answer)


async def blocks(problem, response, row):
    if response == "hangs":
        time.sleep(60)
    return 1.0


def verl_own(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "index": extra_info["index"]}


def of_two(problem, response):
    return 1.0
