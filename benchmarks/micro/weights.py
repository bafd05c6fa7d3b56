"""Weights on their way to engines: time, and bytes held beside them, against one copy of them.

    OMP_NUM_THREADS=1 python -m benchmarks.micro.weights

Layers of random bf16 matrices go (1) into files with a digest, as `--engine-transfer disk` writes
them; (2) over gloo to receivers in processes of their own, which check the digest, as
`--engine-transfer distributed` sends them; (3) into the hf engine. In rounds, interleaved; time is
that of a round's case divided by that of one copy in the same round, medians. What an engine does
with the bytes is in none but the last. Held: tensors' bytes at their peak over the weights' bytes.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.rollout import handover
from moe_upgrpo.rollout.beside import SharingRanks
from moe_upgrpo.rollout.digest import Digest
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.rollout.weight_group import received, send
from tests.megatron.live import Live


class Receiver:
    """A process that takes weights and drops them, in the place of a server."""

    def __init__(self, context):
        self._here, there = context.Pipe()
        self.url = "http://127.0.0.1"
        self._process = context.Process(target=receive, args=(there,), daemon=True)
        self._process.start()

    def take(self, parts, version, digest) -> None:
        taken = send(parts, self._ask, "127.0.0.1", 1, server="the receiver", timeout=60)
        handover.check_taken("the receiver", [taken], digest())

    def _ask(self, where: dict) -> str:
        self._here.send(where)
        return self._here.recv()

    def took(self, version: int) -> None:
        pass

    def close(self) -> None:
        self._here.send(None)
        self._process.join()


def receive(orders) -> None:
    torch.set_num_threads(1)
    while (where := orders.recv()) is not None:
        digest = Digest()
        for _ in digest.through(received(1, timeout=60, **where)):
            pass
        orders.send(digest.value())


def model(folder: Path, mib: int, layers: int) -> Path:
    """A checkpoint of about that many MiB in bf16: eight experts a layer have most of it."""
    hidden = 256
    inner = max(32, round((mib << 20) / 2 / layers / 8 / 3 / hidden / 32) * 32)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--receivers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    receivers = [Receiver(multiprocessing.get_context("spawn")) for _ in range(args.receivers)]
    with tempfile.TemporaryDirectory() as folder:
        source = model(Path(folder, "model"), args.mib, args.layers)
        with Weights(source) as found:
            weights = {name: tensor.clone() for name, tensor in found.tensors()}
            expected = found.shapes()
        size = sum(tensor.nbytes for tensor in weights.values())
        engine = HFEngine(source, "bfloat16", "cpu")

        def one_copy() -> None:
            for tensor in weights.values():
                tensor.clone()

        def files() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as new:
                _, _, failed = handover.written(weights.items(), Path(new), beside=source)
            assert failed is None, failed

        ranks = SharingRanks(60.0)

        def streams() -> None:
            errors = handover.through_streams(
                receivers, weights.items(), expected, ranks=ranks, version=1
            )
            assert errors == [None] * len(receivers), errors

        cases = {
            "one copy": one_copy,
            "to files": files,
            f"to {args.receivers} receivers": streams,
            "into the hf engine": lambda: engine.update_weights(weights.items(), version=1),
        }
        known = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        held: dict[str, float] = {}
        part = size // 32
        with mock.patch.object(handover, "PART_BYTES", part):
            for name, case in cases.items():  # also warms up
                with Live(set(known)) as live:
                    case()  # the hf engine's model is counted from now on
                    live.peak = before = live.now
                    case()
                held[name] = (live.peak - before) / size
            for _ in range(args.rounds):
                for name, case in cases.items():
                    begin = time.perf_counter()
                    case()
                    seconds[name].append(time.perf_counter() - begin)
    for receiver in receivers:
        receiver.close()
    copies = seconds["one copy"]
    print(
        f"{size / 2**20:.0f} MiB; one copy takes {median(copies) * 1e3:.0f} ms; parts of a 32nd\n"
    )
    print("| case | time, of one copy | held, of the weights |\n| --- | --- | --- |")
    for name, taken in seconds.items():
        ratio = median(t / c for t, c in zip(taken, copies, strict=True))
        print(f"| {name} | {ratio:.1f} | {held[name]:.2f} |")


if __name__ == "__main__":
    main()
