"""Comparisons made up: runs with values that are known, written as the real ones are."""

import json

from moe_upgrpo.compare import data

PLAN = {
    "name": "made up",
    "question": "is b < a & <script>?",
    "base": {"steps": 8},
    "arms": {"a": {"loss": "grpo"}, "b": {"loss": "up-grpo"}},
    "seeds": [0, 1, 2, 3],
    "contrasts": [["b", "a"]],
    "primary": {"metric": "eval/pass@1", "summary": "mean"},
    "learning_rates": None,
    "warm_start_by_seed": True,
    "nproc": 1,
    "confidence": 0.95,
}


def run(arm="a", seed=0, *, rows, steps=8, every=4, status="finished", **about):
    """A run of `steps` steps, evaluated every `every`; message, seconds, lr, tuning in `about`."""
    settings = {"tuning": False, "lr": 1e-4, "message": "", "seconds": 60.0, "environment": {}}
    settings["config"] = {"eval_every": every, "steps": steps}
    about = settings | {"arm": arm, "seed": seed, "steps": steps, "status": status} | about
    return data.RunData(about=data.About(**about), rows=rows)


def accuracies(*values, every=4):
    """Rows of pass@1 alone at steps 0, `every`, …"""
    return [{"step": i * every, "eval/pass@1": x} for i, x in enumerate(values)]


def folder(path, runs, plan=PLAN, rates=None):
    path.mkdir(exist_ok=True)
    code = {"commit": "0123456789abcdef", "changed": False}
    written = {"written": "2026-01-02T03:04:05+00:00", "code": code, "plan": plan}
    (path / "plan.json").write_text(json.dumps(written))
    if rates is not None:
        (path / "learning_rates.json").write_text(json.dumps(rates))
    for one in runs:
        name = f"{'tuning-' if one.about.tuning else ''}{one.about.arm}-lr{one.about.lr:g}"
        data.write(path / "data" / f"{name}-seed{one.about.seed}.parquet", one)
    return path
