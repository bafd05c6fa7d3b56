"""Check this code on one GPU in eight minutes; without a GPU, on a CPU with small sizes.

    make gpu-check [ARGS='--only replay']       or python -m benchmarks.gpu
    python -m benchmarks.gpu --carry            the folder to take to a machine without network
    python -m benchmarks.gpu --found            what is here, and what that leaves out

Exit status 1 where a check failed or could not run. docs/gpu.md says how to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import found
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.runner import Job, run_checks
from benchmarks.gpu.sizes import CARD, TINY

TOTAL_S = 450.0  # and half a minute for imports


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.carry:
        return carry(options)
    carried = found.use_carried()
    machine = found.machine()
    for line in [*found.shown(machine), f"{found.CARRIED.name}/: {'there' if carried else '—'}"]:
        print(line)
    for line in found.advice(machine):
        print(f"! {line}")
    if options.found:
        return 0
    if machine["packages"]["torch"] is None or machine["packages"]["numpy"] is None:
        return 1
    return check(options, machine)


def check(options: argparse.Namespace, machine: dict) -> int:
    """Run the checks and write the file."""
    card = found.card(machine)
    if machine["gpus"] and card is None:
        print("! this torch is not built for CUDA: the checks run on the CPU, with small sizes.")
    size = options.size or ("card" if card else "tiny")
    checks = [one for one in CHECKS if not options.only or one.name in options.only]
    begin = time.monotonic()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    def save(results: dict) -> None:
        document = {
            "card": card,
            "size": size,
            "seconds": round(time.monotonic() - begin, 1),
            "machine": machine,
            "checks": results,
        }
        written = out.with_suffix(".part")
        written.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(written, out)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        job = Job(
            sizes=CARD if size == "card" else TINY,
            scratch=Path(scratch),
            carried=found.CARRIED,
            on_card=card is not None and size == "card",
        )
        results = run_checks(
            checks,
            job,
            total_s=options.total_s,
            say=lambda line: print(line, flush=True),
            save=save,
        )
    good = sum(result["state"] == "ok" for result in results.values())
    print(f"{good} of {len(results)} checks passed on {card or 'the CPU'}; {out}")
    return int(good < len(results))


def carry(options: argparse.Namespace) -> int:
    """Build the folder and say what is in it and what has to be there."""
    from benchmarks.gpu import carry

    parts = carry.parts(options.carry_mb)
    size = carry.build(found.CARRIED, parts)
    for part in parts:
        print(f"{part.mb:8.2f} MB  {part.name} {part.version}: {part.why or 'carried'}")
    print(carry.take_warm_start(found.CARRIED, Path(options.cache), options.carry_mb - size))
    size = carry.size_mb(found.CARRIED)
    print(
        f"{found.CARRIED.name}/ has {size:.1f} of {options.carry_mb:g} MB. Take it along beside "
        "the working tree; make gpu-check finds it there."
    )
    return int(not any(part.name == carry.FIRST and part.carried for part in parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [one.name for one in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", help=", ".join(names))
    parser.add_argument("--size", choices=("card", "tiny"), help="by what is there, if not given")
    parser.add_argument("--out", default="runs/gpu-check.json", help="the file of results")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="for all checks together")
    parser.add_argument("--found", action="store_true", help="say what is here, and check nothing")
    parser.add_argument("--carry", action="store_true", help="build the folder to take along")
    parser.add_argument("--carry-mb", type=float, default=40.0, help="its largest size, 1e6 bytes")
    parser.add_argument("--cache", default="runs/cache", help="where make train left a warm start")
    return parser


if __name__ == "__main__":
    sys.exit(main())
