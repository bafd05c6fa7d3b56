"""Faults and limits of Megatron-Core that this package mends, patches or refuses, by release.

    python -m tests.patches.faults          # runs the checks on the installed Megatron-Core and
                                            # writes its column of faults.json

behaviour.py has a check for each; test_megatron_core.py holds faults.json to the installed release,
and docs/make_tables.py makes the table of docs/patches.md from it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_upgrpo.megatron import releases

REPOSITORY = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".json")

# Check: the fault, and what is done about it.
FAULTS = {
    "router_without_transformer_engine": (
        "without Transformer Engine the router ends in a NameError: `te_general_gemm`",
        "mended at run time; patch",
    ),
    "mla_without_transformer_engine": (
        "without Transformer Engine, latent attention (MLA) with whole down projections cannot be "
        "built",
        "mended at run time; patch",
    ),
    "query_without_latent": (
        "MLA without a query latent (Moonlight) gets a norm that the model does not have, or "
        "cannot be built",
        "a class of ours; patch",
    ),
    "splits_on_cpu": (
        "the all-to-all dispatcher's splits stay tensors on a CPU, and gloo refuses them",
        "mended at run time on CPUs; patch",
    ),
    "replay_with_router_fusion": (
        "with `moe_router_fusion`, routing replay neither records nor replays, and nothing says so",
        "refused; patch",
    ),
    "expert_gradients_with_etp": (
        "EP1 with ETP≠TP: expert gradients are not reduced; wrong, without an error",
        "refused where it stands; patch",
    ),
    "shards_of_different_sizes": (
        "EP>1 with ETP>1 and the all-to-all dispatcher: shards of different sizes, which gloo "
        "refuses",
        "refused",
    ),
    "two_interleaved_stages": (
        "two interleaved pipeline stages with batched p2p: activations and gradients change "
        "places; wrong, without an error",
        "overlapped messages instead; patch",
    ),
    "outputs_in_flight": (
        "`deallocate_pipeline_outputs` with `overlap_p2p_comm` frees what is being sent",
        "the option is off where messages overlap; patch",
    ),
    "rotary_key_gradient": (
        "MLA of the local layer spec with tensor parallelism: the rotary key's gradient lacks the "
        "other ranks' heads; wrong, without an error",
        "whole down projections; patch",
    ),
    "norm_with_sequence_parallel": (
        "torch's RMSNorm is refused with sequence parallelism",
        "a norm of ours",
    ),
    "latent_head_sizes": (
        "the local attention does not take the head sizes that MLA gives it",
        "a class of ours",
    ),
    "marks_without_initialisation": (
        "with `perform_initialization=False` weights that are split have no mark, and gradient "
        "norms are wrong",
        "the option is on",
    ),
    "few_groups": (
        "experts in groups: a group counts by its best k / `topk_group` experts, in transformers "
        "by its best two",
        "other `topk_group` refused",
    ),
    "gates_not_normalised": (
        "sigmoid gates are normalised whatever the model says",
        "`norm_topk_prob=False` refused",
    ),
    "rotary_halves": (
        "MLA rotates pairs of neighbours whatever the model says",
        "`rope_interleave=False` refused",
    ),
}


def read() -> dict[str, dict[str, str | None]]:
    """Release -> check -> its error in one line, None where the fault is gone."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def in_one_line(error: str | None) -> str | None:
    """The line of a traceback that begins with the name of the exception, without what follows."""
    lines = [x for x in (error or "").splitlines() if re.match(r"[\w.]*(Error|Exception)\b", x)]
    return lines[-1][:160] if lines else error


def start(folder: Path, *paths: Path) -> subprocess.Popen:
    """Run the checks, with `paths` before everything else that can be imported."""
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", ""), str(REPOSITORY)])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.patches.behaviour", str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def markdown_table() -> str:
    """The faults, what is done about each, and the releases on which it stands."""
    record = read()
    rows = [["fault or limit", "here", *record], ["---"] * (len(record) + 2)]
    for check, (fault, here) in FAULTS.items():
        stands = ["stands" if of[check] else "–" for of in record.values()]
        rows.append([fault, here, *stands])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    with tempfile.TemporaryDirectory() as folder:
        checks = result(start(Path(folder)))["checks"]
    assert checks.keys() == FAULTS.keys()
    version = str(releases.installed())
    record = read() | {version: {name: in_one_line(checks[name]) for name in FAULTS}}
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n")
    for name, error in record[version].items():
        print(f"{version}  {name}: {error or 'gone'}")


if __name__ == "__main__":
    main()
