"""slime and miles in wide layouts: context parallelism, token budgets, sequences of one length.

Each job's token log is held to that of one rank with two sequences a micro-batch.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens
from tests.integrations.places import MILES_WHEEL
from tests.integrations.test_verl import sequences

REPOSITORY = Path(__file__).parents[2]
UP = {"moe_upgrpo_loss": "up-grpo"}
ROUTES = {"use_rollout_routing_replay": True}
OBSERVE = ROUTES | {"moe_upgrpo_replay": "observe"}
# In float32, so that the same tokens have the same routes in every layout; two rollouts' sequences
# at a time in the plain one.
FLOAT = UP | {"fp32": True}
ONE_LENGTH = {"qkv_format": "bshd", "use_dynamic_batch_size": False}
PLAIN = {"R3": "plain", "none": "plain observed"}
WIDE = {  # name -> ranks, flags
    "plain": (1, FLOAT | ROUTES),
    "cp": (2, FLOAT | ROUTES | {"context_parallel_size": 2}),
    "allgather-cp": (2, FLOAT | ROUTES | {"context_parallel_size": 2, "allgather_cp": True}),
    # the stack's own schedule: up to four sequences in a micro-batch, over two data-parallel ranks
    "budget": (2, FLOAT | ROUTES | {"stack_schedules": True, "max_tokens_per_gpu": 40}),
    "bshd": (1, FLOAT | ROUTES | ONE_LENGTH),
    "bshd, cp": (2, FLOAT | ROUTES | ONE_LENGTH | {"context_parallel_size": 2}),
    "plain observed": (1, FLOAT | OBSERVE),
    "allgather-cp observed": (
        2,
        FLOAT | OBSERVE | {"context_parallel_size": 2, "allgather_cp": True},
    ),
    "bshd observed": (1, FLOAT | OBSERVE | ONE_LENGTH | {"micro_batch_size": 2}),
}


def by_content(run: Path) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Columns and the routes of both sides, in an order that no layout changes."""
    table = read_tokens(run / "tokens")
    column = {n: np.array(table[n].to_pylist()) for n in table.column_names if "_exp" not in n}
    at = np.lexsort((column["position"], column["logp_rollout"]))
    return {n: x[at] for n, x in column.items()}, [x[at] for x in read_routes(table)]


class WideChecks:
    stack: str

    @classmethod
    def source(cls) -> Path:
        """Where the stack's code is."""
        variable = f"MOE_UPGRPO_{cls.stack.upper()}"
        if os.environ.get(variable):
            return Path(os.environ[variable])
        if cls.stack != "miles":
            pytest.skip(
                f"{variable} names no checkout of {cls.stack} (make test-stacks); without one "
                "test_slime_stand_ins.py holds the integration to every revision's names"
            )
        assert MILES_WHEEL.is_dir(), f"no {MILES_WHEEL}: make test makes it"
        return MILES_WHEEL

    @classmethod
    def run_jobs(cls, folder: Path, checkpoint: Path, jobs: dict) -> dict:
        """Results of each job's ranks; the stack is in a process of its own."""
        (folder / "jobs.pkl").write_bytes(pickle.dumps(jobs))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.integrations.slime_ranks", cls.stack),
                *(str(cls.source()), str(checkpoint), str(folder)),
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return pickle.loads((folder / "results.pkl").read_bytes())

    @classmethod
    def refused(cls) -> dict[str, str]:
        """Names of `WIDE` that the revision cannot do -> words of the message at start."""
        return {}

    @classmethod
    def has_one_length(cls) -> bool:
        """Whether the revision has --qkv-format bshd."""
        return "--qkv-format" in (cls.source() / cls.stack / "utils/arguments.py").read_text()

    @pytest.fixture(scope="class")
    def wide(self, tiny_checkpoint, tmp_path_factory):
        """The run folders of `WIDE`, and of those that are refused what the ranks said."""
        folder = tmp_path_factory.mktemp(f"{self.stack}-wide")
        batch = sequences(tiny_checkpoint)
        jobs = {
            name: {"world": world, "arguments": (batch, flags, 1)}
            for name, (world, flags) in WIDE.items()
            if self.has_one_length() or flags.get("qkv_format") != "bshd"
        }
        return folder, self.run_jobs(folder, tiny_checkpoint, jobs)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [name for name in WIDE if name not in PLAIN.values()])
    def test_a_wide_layout_logs_what_the_plain_one_does(self, wide, name):
        """Same rows, same routes, log-probs to rounding; or one message at start."""
        folder, results = wide
        if not self.has_one_length() and WIDE[name][1].get("qkv_format") == "bshd":
            pytest.skip(f"this revision of {self.stack} has no --qkv-format")
        if message := self.refused().get(name):
            assert message in results[name], results[name]
            assert not (folder / name / "metrics.jsonl").exists()
            return
        assert not isinstance(results[name], str), results[name]
        mode = read_config(folder / name)["replay"]
        of_both = [by_content(folder / run) for run in (name, PLAIN[mode])]
        (mine, my_routes), (plain, routes) = of_both
        assert len(mine["position"]) == len(plain["position"]) > 0
        for column in ("position", "token_id", "reward", "advantage", "logp_rollout"):
            assert np.array_equal(mine[column], plain[column]), column
        for side, other in zip(my_routes, routes, strict=True):
            assert np.array_equal(np.sort(side, -1), np.sort(other, -1))
        exact = ["layers_mismatched", "overlap", "prefix_mismatched"]
        close = ["logp_old", "margin_min"]
        if mode == "R3":
            exact.append("layers_mismatched_conditional")
            close.append("counterfactual_engine_routing")
        for column in exact:
            assert np.array_equal(mine[column], plain[column]), column
        for column in close:
            np.testing.assert_allclose(mine[column], plain[column], atol=2e-5, err_msg=column)
        # Behind an optimizer step, whose gradients are sums in another order.
        np.testing.assert_allclose(mine["logp_train"], plain["logp_train"], atol=2e-2)
        assert (np.abs(mine["logp_train"] - plain["logp_train"]) < 2e-5).mean() > 0.45
        assert (mine["clipped"] == plain["clipped"]).mean() > 0.95
        np.testing.assert_allclose(mine["gradient_weight"], plain["gradient_weight"], atol=5e-3)
        one, two = (read_metrics(folder / run)[0] for run in (name, PLAIN[mode]))
        for metric in ("mismatch/router_numerator", "mismatch/router_denominator", "reward/mean"):
            assert one[metric] == two[metric]
