"""Steps and memory of this checkout beside those of another one, in one run.

    git worktree add ../before COMMIT
    OMP_NUM_THREADS=1 python benchmarks/micro/beside.py --before ../before

A job of each checkout stands ready, and single calls alternate between them, so that what else the
machine does falls on both. Printed are medians, and the median of the ratios of neighbouring calls,
now / before, with its quartiles. `train` is the model and the mini-batch of `make train` on two
ranks, TP2·EP2; `10M` ten million parameters and responses of 256 tokens on one rank. Memory is the
most of a fresh process (VmHWM) in one call beyond what it held idle: one sequence of 4,096 tokens,
hidden size 32, two layers, with a vocabulary of 512 and of 151,936.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    ranks: int
    sequences: int
    prompt: int
    response: int
    repeats: int
    sizes: dict


TINY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
TEN_MILLION = dict(
    vocab_size=8192, hidden_size=192, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, intermediate_size=384, num_experts=16,
    num_experts_per_tok=4, moe_intermediate_size=160,
)  # fmt: skip
CASES = {
    "train": Case(ranks=2, sequences=64, prompt=6, response=4, repeats=30, sizes={}),
    "10M": Case(ranks=1, sequences=8, prompt=16, response=256, repeats=7, sizes=TEN_MILLION),
    "4096, small vocabulary": Case(
        ranks=1, sequences=1, prompt=96, response=4000, repeats=1, sizes=TINY | {"vocab_size": 512}
    ),
    "4096, real vocabulary": Case(
        ranks=1, sequences=1, prompt=96, response=4000, repeats=1,
        sizes=TINY | {"vocab_size": 151_936},
    ),
}  # fmt: skip
CALLS = ("score", "update")


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since `forget_the_most`."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def forget_the_most() -> None:
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as refs:
        refs.write("5")


def work(name: str, folder: Path) -> None:
    """Run a rank of a job: make the calls that rank 0 is asked for; it sends seconds and bytes."""
    case, rank = CASES[name], int(os.environ["RANK"])
    asked = None if rank else Client(str(folder / "socket"))
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_upgrpo import kernels
    from moe_upgrpo.losses import PolicyLossConfig
    from moe_upgrpo.megatron import groups
    from moe_upgrpo.megatron.actor import MegatronActor
    from moe_upgrpo.megatron.batch import Sample
    from moe_upgrpo.megatron.layout import Layout
    from moe_upgrpo.megatron.settings import OptimizerSettings
    from moe_upgrpo.train.warm_start import tiny_model_config

    kernels.pin()
    config = tiny_model_config()
    if case.sizes:
        config = Qwen3MoeConfig(
            **case.sizes, norm_topk_prob=True, max_position_embeddings=8192, eos_token_id=1,
            tie_word_embeddings=False,
        )  # fmt: skip
    layout = Layout(tp=case.ranks, ep=case.ranks)
    with groups.process_groups(layout):
        if rank == 0:
            torch.manual_seed(0)
            Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
        groups.from_rank_0(None)
        actor = MegatronActor(folder / "model", layout, optimizer=OptimizerSettings())
        rng = np.random.default_rng(0)
        old = np.full(case.response, -1.0, np.float32)
        samples = [
            Sample(
                tokens=rng.integers(2, min(config.vocab_size, 32), case.prompt + case.response),
                prompt_length=case.prompt, old_log_probs=old, rollout_log_probs=old, advantage=1.0,
            )
            for _ in range(case.sequences)
        ]  # fmt: skip
        loss = PolicyLossConfig.preset("up-grpo")
        calls = {
            "score": lambda: actor.score(samples),
            "update": lambda: actor.update(samples, loss),
        }
        while call := groups.from_rank_0(asked and asked.recv()):
            before = resident("VmRSS")
            forget_the_most()
            begin = time.perf_counter()
            calls[call]()
            seconds = time.perf_counter() - begin
            if asked:
                asked.send((seconds, resident("VmHWM") - before))


class Job:
    """The ranks of one checkout."""

    def __init__(self, checkout: Path, name: str, folder: Path):
        ranks = CASES[name].ranks
        words = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        script = str(Path(__file__).resolve())
        with Listener(str(folder / "socket")) as listener:
            self.process = subprocess.Popen(
                [sys.executable, *words, script, "--work", name, str(folder)],
                env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
                cwd=checkout,
                stderr=subprocess.DEVNULL,
            )
            self.connection = listener.accept()

    def call(self, name: str) -> tuple[float, int]:
        self.connection.send(name)
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"This job ended; run it to see why: {self.process.args}") from None

    def end(self) -> None:
        self.connection.send("")
        self.process.wait()


def compare(name: str, call: str, before: Path) -> str:
    """A row of the table."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for i, checkout in enumerate((before, ROOT)):
            folder = Path(scratch, str(i))
            folder.mkdir()
            jobs.append(Job(checkout.resolve(), name, folder))
        warming = 2 if case.repeats > 1 else 0
        found = [[job.call(call) for job in jobs] for _ in range(warming + case.repeats)]
        for job in jobs:
            job.end()
    if not warming:
        was, now = (peak / 2**20 for _, peak in found[0])
        return f"| {name} | {call} | {was:,.0f} MiB | {now:,.0f} MiB | {now / was:.3f} |"
    pairs = [[seconds for seconds, _ in pair] for pair in found[warming:]]
    was, now = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return (
        f"| {name} | {call} | {was * 1e3:,.0f} ms | {now * 1e3:,.0f} ms | {middle:.2f} "
        f"({low:.2f} to {high:.2f}) |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        # This folder has a kernels.py, and transformers would take it for a package of that name.
        sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
        return work(sys.argv[2], Path(sys.argv[3]))
    import tyro

    def options(before: Path, cases: list[str] = list(CASES)) -> None:  # noqa: B006
        print("| | call | before | now | now / before |\n| --- | --- | --- | --- | --- |")
        for name in cases:
            for call in CALLS:
                print(compare(name, call, before), flush=True)

    return tyro.cli(options, description=__doc__)


if __name__ == "__main__":
    main()
