"""`moe-upgrpo doctor` of this machine, for the results file."""

from __future__ import annotations

from benchmarks.gpu.checks import Outcome
from moe_upgrpo.tools.doctor import diagnose


def doctor(job) -> Outcome:
    found = diagnose().to_json()
    paths = found["code_paths"]
    line = f"{found['torch'].get('version')}; " + "; ".join(
        f"{what}: {paths[what]}"
        for what in ("device", "attention", "experts", "optimizer")
        if paths
    )
    kept = ("python", "platform", "torch", "cpu", "code_paths")
    return Outcome(
        line=line,
        figures={name: found[name] for name in kept},
        faults=tuple(found["problems"]),
    )
