"""The comparison at scale on stand-ins: data preparation, jobs, evaluation, paired test, report.

The stand-ins have the architecture of the published models, small; the problems are one-digit sums
in the layouts of DAPO-Math-17k and AIME 2024. Not covered: the models, problems and lengths
themselves, GPUs, servers, several machines.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.studies.power import correct_counts
from moe_upgrpo.compare import data, jobs
from moe_upgrpo.compare.plan import from_values, read_plan
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats.power import paired_test
from moe_upgrpo.store import RunFolder, read_evaluations, read_metrics
from moe_upgrpo.tasks import ArithmeticTask
from moe_upgrpo.tasks.files import read_problems
from moe_upgrpo.tools.plan import check_fits, make_plan
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.options import mapping_arguments
from moe_upgrpo.train.tiny import TinyModel
from moe_upgrpo.train.warm_start import WarmStartConfig, warm_start
from tests.ranks import run_command
from tests.train.test_launch import ROOT, launch

COMPARE = ROOT / "examples" / "compare"
AT_SCALE = {"qwen3-30b-a3b": 24.0, "qwen3-14b-base": 0.0}  # GB of a server on each GPU
SCRIPT = "examples/compare_at_scale.sh"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ARMS = {"grpo", "dapo", "gspo", "up-grpo", "up-gspo", "up-tic"}


@pytest.mark.parametrize("name", AT_SCALE)
def test_the_plans_are_those_of_the_six_losses_and_fit(name, monkeypatch):
    import tyro

    monkeypatch.chdir(ROOT)
    plan = read_plan(COMPARE / f"{name}.yaml")
    assert plan.arms == {arm: {"loss": arm} for arm in ARMS}
    assert (plan.primary.metric, plan.base["eval_samples"]) == ("eval/avg@32", 32)
    runs = [*plan.tuning(), *plan.runs(dict.fromkeys(ARMS, 1e-6))]
    assert len({run.key for run in runs}) == 6 * 3 + 6 * 5
    assert plan.base["minibatches"] * plan.base.get("epochs", 1) == 16
    words = [*mapping_arguments(plan.options(runs[-1])), "--server-gb", str(AT_SCALE[name])]
    config = tyro.cli(PlanConfig, args=words)
    assert (config.objective.loss, config.run.seed) == ("up-tic", 4)
    assert config.trainer.optimizer.lr == 1e-6
    check_fits(make_plan(config))


def test_the_two_plans_differ_where_the_models_do():
    first, second = (yaml.safe_load((COMPARE / f"{name}.yaml").read_text()) for name in AT_SCALE)
    differ = {key for key in first if first[key] != second[key]}
    assert differ == {"name", "question", "base"}
    a, b = first["base"], second["base"]
    assert {key for key in a | b if a.get(key) != b.get(key)} == {
        "model", "tp", "ep", "engine_url", "vllm"
    }  # fmt: skip


BEFORE = "Solve the following.\nAnswer on a line of its own.\n\n"
AFTER = "\n\nRemember the line of its own."


def dapo_row(problem: str, answer: str) -> dict:
    """As verl's DAPO-Math-17k and AIME-2024 have them."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": problem}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
    }


@pytest.fixture(scope="session")
def preparation():
    """examples/prepare_data.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "examples/prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prepare(preparation, tmp_path: Path, train: list[dict], heldout: list[dict], **more) -> None:
    pq.write_table(pa.Table.from_pylist(train), tmp_path / "train.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in heldout)
    (tmp_path / "heldout.jsonl").write_text(lines)
    arguments = preparation.Arguments(
        train=(tmp_path / "train.parquet",),
        heldout=(tmp_path / "heldout.jsonl",),
        output_dir=tmp_path / "data",
        **more,
    )
    preparation.main(arguments)


def test_problems_of_both_files_come_out_in_the_same_words(preparation, tmp_path, capsys):
    train = [dapo_row(f"{BEFORE}What is {i}?{AFTER}", str(i)) for i in range(5)]
    heldout = [
        {"Problem": "What  is 3?", "Answer": 3},  # a training problem, spaced otherwise
        {"Problem": "What is ten?\nA number.", "Answer": "010"},
    ]
    fields = {"prompt_field": "Problem", "answer_field": "Answer"}
    prepare(preparation, tmp_path, train * 3, heldout, **fields, problems=2)
    said = capsys.readouterr().out
    assert "10 repeated rows" in said and "1 training problems are held-out" in said
    found = read_problems(tmp_path / "data" / "heldout.parquet").rows
    assert [(row.prompt, row.answer) for row in found] == [
        (f"{BEFORE}What  is 3?{AFTER}", "3"),
        (f"{BEFORE}What is ten?\nA number.{AFTER}", "010"),
    ]
    rest = read_problems(tmp_path / "data" / "train.parquet").rows
    assert [row.answer for row in rest] == ["0", "1", "2", "4"]
    with pytest.raises(UserError, match="2 held-out problems; 30 were asked for"):
        prepare(preparation, tmp_path, train, heldout, **fields, problems=30)


def test_problems_without_common_words_stay_as_they_are(preparation, tmp_path):
    train = [dapo_row(f"{i}+1=", str(i + 1)) for i in range(4)]
    known = {"prompt": "0+1=", "answer": 1}
    prepare(preparation, tmp_path, train, [known, {"prompt": "9+1=", "answer": 10}])
    found = read_problems(tmp_path / "data" / "heldout.parquet").rows
    assert [row.prompt for row in found] == ["0+1=", "9+1="]
    assert len(read_problems(tmp_path / "data" / "train.parquet").rows) == 3
    with pytest.raises(UserError, match="nothing is left to train on"):
        prepare(preparation, tmp_path, train[:1], [known])
    chat = [
        dapo_row("1", "1") | {"prompt": [{"role": r, "content": "1"} for r in ("system", "user")]}
    ]
    with pytest.raises(UserError, match="a chat of 2 messages"):
        prepare(preparation, tmp_path, chat, [known])


PLAN = {
    "name": "x",
    "question": "?",
    "base": {"steps": 2, "save_every": 1},
    "arms": {"a": {"loss": "grpo"}, "b": {"loss": "up-grpo"}},
    "seeds": [0, 1],
    "contrasts": [["b", "a"]],
}


def fake_run(folder: Path, key: str, steps: int, correct: float = 0.5) -> None:
    config = {"loss": key, "optimizer": {"lr": 1e-4}, "steps": 2}
    run = RunFolder.create(folder / "runs" / key, config)
    for step in range(steps + 1):
        run.append_metrics({"step": step, "reward/correct_rate": correct})


def test_a_job_is_to_be_done_until_its_data_are_kept(tmp_path):
    plan = from_values(PLAN)
    keys = ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert [run.key for run in jobs.to_do(plan, tmp_path)] == keys
    words = jobs.start(plan, tmp_path, "a-seed1")
    assert words == [
        "--config", str(tmp_path / "logs" / "a-seed1.yaml"),
        "--output-dir", str(tmp_path / "runs" / "a-seed1"),
    ]  # fmt: skip
    assert yaml.safe_load(Path(words[1]).read_text())["seed"] == 1
    fake_run(tmp_path, "a-seed1", steps=1)
    with pytest.raises(UserError, match="step 1 of 2: start it again"):
        jobs.end(plan, tmp_path, "a-seed1")
    (tmp_path / "runs" / "a-seed1" / "checkpoints" / "state-000001").mkdir(parents=True)
    resumed = ["--resume", str(tmp_path / "runs" / "a-seed1")]
    assert jobs.start(plan, tmp_path, "a-seed1") == resumed
    jobs.end(plan, tmp_path, "a-seed1", crashed=True)
    assert jobs.start(plan, tmp_path, "a-seed1") == []
    kept = data.read(tmp_path / "data" / "a-seed1.parquet")
    assert (kept.about.status, kept.about.arm, len(kept.rows)) == ("crashed", "a", 2)
    # Stopped between its last step and --end.
    fake_run(tmp_path, "b-seed0", steps=2)
    with pytest.raises(UserError, match="has done its 2 steps"):
        jobs.end(plan, tmp_path, "b-seed0", crashed=True)
    (tmp_path / "runs" / "b-seed0" / "checkpoints" / "step-000002").mkdir(parents=True)
    assert jobs.start(plan, tmp_path, "b-seed0") == []
    assert data.read(tmp_path / "data" / "b-seed0.parquet").about.status == "finished"
    jobs.end(plan, tmp_path, "b-seed0")  # again: nothing
    assert [run.key for run in jobs.to_do(plan, tmp_path)] == ["a-seed0", "b-seed1"]
    with pytest.raises(UserError, match="c-seed0 is not a run to be done now: a-seed0, b-seed1"):
        jobs.start(plan, tmp_path, "c-seed0")


def test_the_learning_rates_are_chosen_before_anything_else_is_to_be_done(tmp_path):
    rates = {"values": [1e-4, 1e-3], "seeds": [9], "steps": 2}
    plan = from_values(PLAN | {"learning_rates": rates})
    tuning = jobs.to_do(plan, tmp_path)
    assert [run.key for run in tuning] == [
        "tuning-a-lr0.0001-seed9", "tuning-b-lr0.0001-seed9",
        "tuning-a-lr0.001-seed9", "tuning-b-lr0.001-seed9",
    ]  # fmt: skip
    with pytest.raises(UserError, match="a-seed0 is not a run to be done now"):
        jobs.start(plan, tmp_path, "a-seed0")
    for number, run in enumerate(tuning):  # the last of each arm is the best
        fake_run(tmp_path, run.key, steps=2, correct=0.1 * number)
        jobs.end(plan, tmp_path, run.key)
    assert {run.lr for run in jobs.to_do(plan, tmp_path)} == {1e-3}
    words = jobs.start(plan, tmp_path, "a-seed0")
    assert yaml.safe_load(Path(words[1]).read_text())["optimizer"] == {"lr": 1e-3}


@pytest.fixture
def stand_in(request, preparation, tmp_path, cache) -> dict:
    """The plan, on a small model that is warm-started on sums, and two files of them.

    What is not named here stays as the plan has it: losses, dtype, recomputation, dynamic sampling,
    overlong shaping, 16 optimizer steps a batch.
    """
    name = request.param
    values = yaml.safe_load((COMPARE / f"{name}.yaml").read_text())
    tiny = TinyModel(layers=2, hidden=64, expert_intermediate=32,
                     like=ROOT / "examples" / "configs" / "models" / name)  # fmt: skip
    model = warm_start(
        ArithmeticTask(1),
        tiny.hugging_face(),
        settings=WarmStartConfig(target_pass_at_1=0.2, probe_problems=64),
        cache_dir=cache / "stand-in",
    )
    sums = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
    heldout = [{"prompt": p, "answer": answer} for p, answer in sums[::13]]
    train = [dapo_row(*row) for row in sums] * 2
    prepare(preparation, tmp_path, train, heldout, problems=8)
    base = values["base"] | {
        "model": str(model),
        "data": [str(tmp_path / "data" / "train.parquet")],
        "eval_data": [str(tmp_path / "data" / "heldout.parquet")],
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
        "overlong_buffer": 2,
        "prompts": 8,
        "group": 8,
        "steps": 2,
        "tp": 2,
        "ep": min(2, values["base"]["ep"]),
        "micro_batch": 64,
        "engine": "hf",
        "eval_every": 2,
        "save_every": 1,
        "token_log_share": 0.5,
    }
    base = {k: v for k, v in base.items() if k not in ("vllm", "engine_url") and v is not None}
    base["optimizer"] |= {"lr": 1e-4, "warmup_steps": 1}
    arms = {arm: values["arms"][arm] for arm in ("dapo", "up-grpo")}
    made = values | {"base": base, "arms": arms, "seeds": [0, 1], "nproc": 2}
    made["contrasts"] = [["up-grpo", "dapo"]]
    del made["learning_rates"]
    return made


def script(*words: object, **environment: str) -> subprocess.CompletedProcess:
    more = {"PATH": PATH, "NPROC": "2"} | environment
    return launch("bash", SCRIPT, *map(str, words), timeout_s=1800, **more)


def as_script(plan: Path, folder: Path, key: str) -> subprocess.CompletedProcess:
    """Do for one run what the script does."""
    words = jobs.start(read_plan(plan), folder, key)
    result = run_command("train", *words, ranks=2, timeout_s=1800)
    jobs.end(read_plan(plan), folder, key)
    return result


def killed_after_a_step(plan: Path, folder: Path, key: str) -> None:
    """The run's job, gone without a word once its first step has a checkpoint."""
    log = folder.with_name("killed.log")
    with log.open("w") as said:
        job = subprocess.Popen(
            ["bash", SCRIPT, str(plan), str(folder), key],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "NPROC": "2", "PATH": PATH},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 900
        while not (folder / "runs" / key / "checkpoints" / "state-000001").is_dir():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
    finally:
        whole = psutil.Process(job.pid)
        processes = [whole, *whole.children(recursive=True)]  # ranks have sessions of their own
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()
        assert not psutil.wait_procs(processes, timeout=60)[1]
    assert not (folder / "data" / f"{key}.parquet").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)  # three minutes on an idle machine
@pytest.mark.parametrize("stand_in", AT_SCALE, indirect=True)
def test_the_comparison_runs_on_a_stand_in(stand_in, tmp_path):
    plan, folder = tmp_path / "plan.yaml", tmp_path / "comparison"
    plan.write_text(yaml.safe_dump(stand_in))
    keys = script(plan, folder).stdout.split()
    assert keys == ["dapo-seed0", "up-grpo-seed0", "dapo-seed1", "up-grpo-seed1"]
    killed_after_a_step(plan, folder, keys[0])
    for key in keys:
        # The other runs in forks: the script's four interpreters import for half a minute.
        result = script(plan, folder, key) if key == keys[0] else as_script(plan, folder, key)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("resumed" in result.stdout) == (key == keys[0]), result.stdout
        path = folder / "runs" / key
        rows = read_metrics(path)
        assert [row["step"] for row in rows] == [0, 1, 2]
        table = read_evaluations(path).to_pandas()
        for row in (rows[0], rows[2]):
            of_step = table[table.step == row["step"]]
            assert len(of_step) == row["eval/problems"] == 8
            assert row["eval/avg@32"] == pytest.approx((of_step.correct / 32).mean())
            assert row["eval/maj@32"] == pytest.approx(of_step.majority.mean())
            assert row["eval/best@32"] == pytest.approx((of_step.correct > 0).mean())
            assert 0 < row["eval/avg@32"] < 1
        for row in rows[1:]:
            assert row["groups/kept"] == 8 and row["grad_norm"] > 0
    assert script(plan, folder).stdout == ""
    assert script(plan, folder, keys[0]).stdout == f"{keys[0]} is done.\n"
    counts = [correct_counts([folder / "runs" / f"{arm}-seed{s}" for s in (0, 1)])[0]
              for arm in ("dapo", "up-grpo")]  # fmt: skip
    tested = paired_test(*(c / 32 for c in counts))
    assert (tested.seeds, tested.problems) == (2, 8)
    assert np.isfinite([tested.se_problems, tested.se_seeds, tested.p_these]).all()
    report = run_command("compare", plan, "--output", folder, timeout_s=1800)
    assert report.returncode == 0, report.stderr[-3000:]
    runs = data.read_all(folder)
    assert {(run.about.arm, run.about.seed, run.about.status) for run in runs} == {
        (arm, seed, "finished") for arm in ("dapo", "up-grpo") for seed in (0, 1)
    }
