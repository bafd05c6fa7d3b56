"""Whether jobs of four ranks start, load and end, however the machine treats them.

    python -m benchmarks.micro.starts --starts 50 --busy 4
    python -m benchmarks.micro.starts --starts 10 --busy 4 --way torchrun

A start makes Megatron's process groups in one of three layouts, loads Hugging Face weights, reads
the training state that two ranks wrote (TP2·EP2), writes it anew and ends. All ranks have to give
the writer's weights to the last bit. Ranks come from the fork server of the tests, or from torchrun
with interpreters of their own. `busy` processes keep the cores from them, and each rank is stopped
(SIGSTOP) at random `pauses` times for up to a second, so that every order of arrival is tried. A
start that takes longer than `limit_s` is a hang: the Python stacks of its ranks are printed, and
the benchmark ends with 1.
"""

import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.checkpoint import load_state, save_state
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.megatron.measured import make_samples
from tests.ranks import RankFailed, run_ranks

RANKS = 4
LAYOUTS = (Layout(tp=2, ep=2, pp=2), Layout(tp=2, ep=2), Layout(ep=4))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS))


def job(layout: Layout, model: Path, source: Path | None, target: Path) -> str:
    """The SHA-256 of the weights after loading, or after one step where there is no `source`."""
    torch.set_num_threads(1)
    (target / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()), encoding="utf-8")
    with groups.process_groups(layout):
        actor = MegatronActor(model, layout, optimizer=OptimizerSettings(lr=1e-2, warmup_steps=1))
        if source is None:
            actor.update(make_samples(), PolicyLossConfig.preset("up-grpo"))
        else:
            load_state(source, actor)
        state = target / "state"
        state.mkdir(exist_ok=True)
        save_state(state, actor)
        digest = hashlib.sha256()
        for name, tensor in actor.export_weights():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def as_rank(values: dict) -> None:
    """Run as a rank of torchrun."""
    target = Path(values["target"])
    with (target / f"stack-{os.environ['RANK']}").open("w", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file)
        layout = Layout(**values["layout"])
        found = job(layout, Path(values["model"]), Path(values["source"]), target)
    (target / f"found-{os.environ['RANK']}").write_text(found, encoding="utf-8")


def by_torchrun(layout: Layout, model: Path, source: Path, target: Path, limit_s: float) -> list:
    sizes = {name: getattr(layout, name) for name in ("tp", "ep", "pp")}
    values = {"layout": sizes, "model": str(model), "source": str(source), "target": str(target)}
    command = [*TORCHRUN, "-m", "benchmarks.micro.starts", "--rank", json.dumps(values)]
    agent = subprocess.Popen(
        command, stderr=subprocess.PIPE, start_new_session=True, encoding="utf-8"
    )
    try:
        _, errors = agent.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        for pid in pids(target):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(2)
        stacks = "\n".join(
            f"{f.name}:\n{f.read_text(encoding='utf-8')}" for f in sorted(target.glob("stack-*"))
        )
        raise RankFailed(f"no result in {limit_s} s\n{stacks}") from None
    finally:
        for pid in (*pids(target), agent.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if agent.returncode:
        raise RankFailed(errors)
    return [(target / f"found-{rank}").read_text(encoding="utf-8") for rank in range(RANKS)]


def pids(target: Path) -> list[int]:
    return [int(text) for f in target.glob("pid-*") if (text := f.read_text(encoding="utf-8"))]


@contextmanager
def pausing(target: Path, times: int, seed: int):
    """Stop each rank of the job now and then."""
    draw, ended = random.Random(seed), threading.Event()

    def pause() -> None:
        while len(pids(target)) < RANKS and not ended.wait(0.01):
            pass
        for _ in range(times * RANKS):
            with suppress(ProcessLookupError, IndexError):
                pid = draw.choice(pids(target))
                os.kill(pid, signal.SIGSTOP)
                ended.wait(draw.random())
                os.kill(pid, signal.SIGCONT)
            if ended.wait(draw.random() / 4):
                return

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def spin() -> None:
    while True:
        pass


@contextmanager
def kept_busy(number: int):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=spin, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def main(
    starts: int = 50,
    busy: int = 4,
    pauses: int = 2,
    limit_s: float = 180,
    way: Literal["forkserver", "torchrun"] = "forkserver",
    seed: int = 0,
    rank: str = "",
) -> None:
    """Start jobs until one hangs.

    Args:
        starts: how many.
        busy: processes that do nothing but compute, beside.
        pauses: of each rank in a start.
        limit_s: a start that takes longer hangs.
        way: how ranks are started.
        seed: of the pauses.
        rank: what torchrun gives the ranks; not for the command line.
    """
    warnings.filterwarnings("ignore")
    if rank:
        return as_rank(json.loads(rank))
    seconds, loads = [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        torch.manual_seed(0)
        model, first = folder / "model", folder / "first"
        first.mkdir()
        sizes = tiny_model_config(layers=2, hidden=64, max_positions=128)
        sizes.vocab_size = 64
        Qwen3MoeForCausalLM(sizes).save_pretrained(model)
        expected, twin = run_ranks(2, job, Layout(tp=2, ep=2), model, None, first)
        assert expected == twin
        stack.enter_context(kept_busy(busy))
        for number in range(starts):
            layout, target = LAYOUTS[number % len(LAYOUTS)], folder / str(number)
            target.mkdir()
            arguments = (layout, model, first / "state", target)
            begin = time.monotonic()
            try:
                with pausing(target, pauses, seed + number):
                    if way == "torchrun":
                        found = by_torchrun(*arguments, limit_s)
                    else:
                        found = run_ranks(RANKS, job, *arguments, timeout_s=limit_s)
            except RankFailed as error:
                sys.exit(f"start {number + 1} of {starts} ({layout}): {error}")
            if found != [expected] * RANKS:
                sys.exit(f"start {number + 1} of {starts} ({layout}): other weights: {found}")
            seconds.append(time.monotonic() - begin)
            loads.append(os.getloadavg()[0] / os.cpu_count())
            print(f"{number + 1} of {starts}: {layout}, {seconds[-1]:.1f} s", flush=True)
    print(
        f"{starts} starts of {RANKS} ranks by {way}, {busy} busy processes, {pauses} pauses of "
        f"each rank, load {statistics.median(loads):.1f} for each core: none hung; median "
        f"{statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s"
    )


if __name__ == "__main__":
    tyro.cli(main)
