# SPDX-License-Identifier: Apache-2.0
"""The process in which math-verify runs, started by `MathVerifier` as a file of its own.

It reads lines of JSON, [function, text, ...], and writes the JSON of each result. A request that
takes more than `SECONDS` of processor time ends the process: the kernel's timer does that, also
inside one long multiplication in C, where math-verify's own timeouts (SIGALRM handlers, and those
in a main thread only) would wait for its end. What a response asks for is bounded in memory too.
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache

SECONDS = 3.0
MEMORY = 4 * 2**30  # bytes of address space
TAIL = 4000  # characters


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    logging.disable()
    functions = _functions()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        function, *texts = json.loads(line)
        # SIGPROF, not caught: processor time, so that a busy machine changes no reward.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reply = functions[function](*texts)
        except Exception:  # of sympy, on what a model wrote; MemoryError, RecursionError
            reply = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _functions():
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # A \boxed answer wins over formulas around it.
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    @lru_cache(maxsize=256)
    def answers(text: str) -> list:
        return parse(_end(text), targets, parsing_timeout=None)

    def right(reference: str, response: str) -> bool:
        return verify(answers(_boxed(reference)), answers(response), timeout_seconds=None)

    def same(first: str, second: str) -> bool:
        return verify(answers(first), answers(second), timeout_seconds=None)

    def answer(response: str) -> str | None:
        found = answers(response)
        return str(found[-1]) if found else None

    return {"right": right, "same": same, "answer": answer}


def _end(text: str) -> str:
    """The last \\boxed and what follows it, or else the last `TAIL` characters.

    math-verify makes one set of all boxes: `\\boxed{45}, no: \\boxed{46}` would be {45, 46}. And a
    model that repeats numbers to the end of its response would take seconds to read.
    """
    box = text.rfind("\\boxed")
    return text[box : box + TAIL] if box >= 0 else text[-TAIL:]


def _boxed(reference: str) -> str:
    """A reference answer as math-verify reads LaTeX.

    A whole solution ends with its \\boxed answer, GSM8K's with a line `#### answer`; anything else
    is the answer itself.
    """
    if "\\boxed" in reference:
        return reference
    return f"\\boxed{{{reference.rsplit('####', 1)[-1].strip()}}}"


if __name__ == "__main__":
    main()
