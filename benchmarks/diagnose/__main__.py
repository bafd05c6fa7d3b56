"""Print how often the injected fault is named first, and what clean pairs are said to have.

    python -m benchmarks.diagnose [--seeds N]

Every fault is put into a pair of engine and trainer that had none, once for each seed, and
diagnosed as the records of both sides and, where a token log can hold it, as a run folder.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.diagnose.faults import FAULTS, injected
from benchmarks.diagnose.pairs import CLEAN, make_pair
from benchmarks.diagnose.records import write_run
from moe_upgrpo.tools.diagnose import verdict
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.inputs import from_run


@dataclass(frozen=True)
class Outcome:
    """A diagnosis of an injected fault, or of a pair without one."""

    name: str
    source: str
    wanted: str | None
    named: str | None

    @property
    def right(self) -> bool:
        return self.named == self.wanted


def named(evidence: Evidence) -> Finding | None:
    """The fault named first."""
    found = verdict.look(evidence).findings
    return next((one for one in found if one.kind == "fault" or one.cause == "stale-weights"), None)


def diagnose(name: str, evidence: Evidence, wanted: str | None, storable: bool) -> list[Outcome]:
    """The fault named first in the records of both sides, and in a run folder that holds them."""
    sources = {"records": evidence}
    if storable:
        with tempfile.TemporaryDirectory() as folder:
            run = write_run(Path(folder) / "run", evidence)
            sources["run folder"] = from_run(run).evidence
    found = {source: named(of) for source, of in sources.items()}
    return [Outcome(name, s, wanted, one.cause if one else None) for s, one in found.items()]


def outcomes(seeds: int) -> list[Outcome]:
    """All injected faults, then all clean pairs, each with every seed."""
    found = []
    for name, fault in FAULTS.items():
        for seed in range(seeds):
            evidence = injected(name, seed=seed)
            found += diagnose(name, evidence, fault.cause, fault.storable)
    for name, shape in CLEAN.items():
        for seed in range(seeds):
            found += diagnose(name, make_pair(shape, seed=seed).evidence, None, True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    all_of_them = outcomes(parser.parse_args().seeds)
    print("| injected | named first | right |\n| --- | --- | --- |")
    for name in dict.fromkeys(one.name for one in all_of_them):
        mine = [one for one in all_of_them if one.name == name]
        causes = Counter(one.named or "no fault" for one in mine)
        shown = ", ".join(f"{cause} {times}" for cause, times in causes.most_common())
        clean = "" if mine[0].wanted else "clean: "
        print(f"| {clean}{name} | {shown} | {sum(one.right for one in mine)} of {len(mine)} |")
    for what, mine in (
        ("faults named first", [one for one in all_of_them if one.wanted]),
        ("clean pairs without a fault", [one for one in all_of_them if not one.wanted]),
    ):
        right = sum(one.right for one in mine)
        kinds = len({one.name for one in mine})
        print(f"{what}: {right} of {len(mine)} ({right / len(mine):.1%}), {kinds} kinds")


if __name__ == "__main__":
    main()
