"""Our models with the layers of the installed Transformer Engine: their weights, on any machine.

    python -m benchmarks.micro.te_layers [--write]

Builds the tests' tiny models of each family with the layers that a GPU would take, on one rank and
on two (TP2·EP2), and looks at every weight: its name and shape against the models of torch's
layers, its marks, a checkpoint in and out again to the bit; at the epsilon of every norm; and a
training state read in the other layout.
Nothing is computed: Transformer Engine's kernels take a GPU, its modules only ask whether there is
one. `--write` puts names, shapes and marks into tests/megatron/te_layers.json, from which `make
test` makes stand-ins.
"""

import argparse
import importlib
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from safetensors.torch import load_file

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import actor as actor_module
from moe_upgrpo.megatron import backend, model, weights
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.checkpoint import load_state, save_state
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.conftest import save_tiny
from tests.megatron import te_layers
from tests.megatron.conftest import save_checkpoints
from tests.ranks import run_ranks

STEP = OptimizerSettings(lr=1e-2, warmup_steps=0)
PACKAGES = ("transformer_engine", "megatron-core", "torch")


@contextmanager
def as_with_a_gpu() -> Iterator[None]:
    """Let `moe_upgrpo.megatron.model` choose as on a machine with CUDA.

    On one without, weights are on the CPU, and Transformer Engine's modules are told that there is
    a GPU: they ask when they are made (module/base.py: "TransformerEngine needs CUDA.").
    """
    if backend.has_cuda():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(backend, "has_cuda", lambda: False),
        mock.patch.object(model, "has_cuda", lambda: True),
    ):
        yield


def of_rank(layout: Layout, folder: Path) -> dict:
    """Facts of a rank: the rows of its weights, what differs, and how many came out to the bit."""
    with process_groups(layout):
        hf = read_model_config(folder)
        found = {"differs": [], "marked": set(), "experts": set(), "exact": 0}
        for dtype in (torch.float32, torch.bfloat16):
            (ours,) = model.build_model(hf, layout, dtype)
            with as_with_a_gpu():
                (chunk,) = model.build_model(hf, layout, dtype)
            found["rows"] = te_layers.rows(chunk)
            found["differs"] += te_layers.differences(chunk, ours, hf) + epsilons(chunk, hf)
            found["marked"] |= {
                row.name
                for row, ours_is in zip(found["rows"], te_layers.rows(chunk), strict=True)
                if row.marks != ours_is.marks
            }
            found["experts"] |= {
                type(layer.mlp.experts).__name__
                for layer in chunk.decoder.layers
                if hasattr(layer.mlp, "experts")
            }
            weights.load_weights([chunk], hf, folder)
            found["exact"] += exact(chunk, hf, folder, dtype)
    return found


def epsilons(chunk: torch.nn.Module, hf) -> list[str]:
    """Norms with an epsilon that is not transformers': 1e-6 for latents, else the config's."""
    norms = {name: module.eps for name, module in chunk.named_modules() if hasattr(module, "eps")}
    latent = ("linear_q_up_proj", "linear_kv_up_proj")
    expected = {n: model.LATENT_EPS if n.endswith(latent) else hf.rms_norm_eps for n in norms}
    least = 2 * hf.num_hidden_layers + 1
    few = [] if len(norms) >= least else [f"{len(norms)} norms, {least} at least are expected"]
    return few + [
        f"{n}: epsilon {e}, not {expected[n]}" for n, e in norms.items() if e != expected[n]
    ]


def exact(chunk: torch.nn.Module, hf, folder: Path, dtype: torch.dtype) -> int:
    """How many of the exported tensors are the checkpoint's to the bit."""
    source = load_file(folder / "model.safetensors")
    exported = dict(weights.export_weights([chunk], hf))
    assert exported.keys() == source.keys()
    return sum(
        torch.equal(tensor.cpu(), source[name].to(tensor.dtype))
        and tensor.dtype in (dtype, source[name].dtype)
        for name, tensor in exported.items()
    )


def state_of_rank(layout: Layout, folder: Path, source: Path | None, target: Path) -> dict:
    """Weights after a training state was read from `source`, or a step without a model was made;
    written to `target`."""
    with process_groups(layout), mock.patch.object(actor_module, "build_model", built_with_theirs):
        actor = MegatronActor(folder, layout, optimizer=STEP, dtype="bfloat16")
        if source:
            load_state(source, actor)
        else:
            for parameter in actor.chunks[0].parameters():
                parameter.main_grad.fill_(0.01)
            actor.optimizer.step()
        target.mkdir(exist_ok=True)
        save_state(target, actor)
        return {name: tensor.cpu().clone() for name, tensor in actor.export_weights()}


def built_with_theirs(*args) -> list[torch.nn.Module]:
    with as_with_a_gpu():
        return model.build_model(*args)


def check_state(folder: Path, states: Path) -> bool:
    """Whether a training state goes from TP2·EP2 to one rank and back to the bit."""
    two, one = te_layers.LAYOUTS["TP2·EP2"], te_layers.LAYOUTS["one rank"]
    steps = ((two, None, "first"), (one, "first", "second"), (two, "second", "third"))
    weights_then = [
        rank
        for layout, source, target in steps
        for rank in run_ranks(
            layout.tp, state_of_rank, layout, folder, source and states / source, states / target
        )
    ]
    with process_groups(one):
        first, _, third = (
            {
                name: tensor
                for name, tensor in load_plain_tensors(str(states / target)).items()
                if isinstance(tensor, torch.Tensor)
            }
            for _, _, target in steps
        )
    changed = load_file(folder / "model.safetensors")
    return (
        sum("exp_avg" in name for name in first) > 20
        and first.keys() == third.keys()
        and all(torch.equal(first[name], third[name]) for name in first)
        and all(torch.equal(weights_then[0][n], w[n]) for w in weights_then for n in w)
        and any(not torch.equal(changed[n].bfloat16(), t) for n, t in weights_then[0].items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="the table that the tests read")
    options = parser.parse_args()
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        raise UserError(
            f"Not run: transformer_engine.pytorch cannot be imported ({error}). It has to be built "
            "from source beside a torch for CUDA, nvcc too, but needs no GPU: "
            "pip install --no-build-isolation 'transformer_engine[pytorch]'."
        ) from None
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    with as_with_a_gpu():
        paths = model.code_paths()
    print("; ".join(f"{name}: {path}" for name, path in paths.items()))
    failed, tables = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"tiny": save_tiny(Path(folder) / "tiny")} | save_checkpoints(Path(folder))
        for name, layouts in te_layers.MODELS.items():
            for layout_name in layouts:
                layout = te_layers.LAYOUTS[layout_name]
                if backend.has_cuda() and layout.tp > torch.cuda.device_count():
                    print(f"{name}, {layout_name}: not run, one GPU for each rank is needed")
                    continue
                ranks = run_ranks(layout.tp, of_rank, layout, checkpoints[name])
                first = ranks[0]
                differs = [line for rank in ranks for line in rank["differs"]]
                moe = {paths["experts"]} if name != "dense" else set()
                if first["experts"] != moe:
                    differs.append(f"experts are {first['experts']}, not {moe}")
                differs += [f"rank {r}'s weights are not as rank 0's" for r, rank in
                            enumerate(ranks) if rank["rows"] != first["rows"]]  # fmt: skip
                total = 2 * len(load_file(checkpoints[name] / "model.safetensors"))
                exact = [rank["exact"] for rank in ranks]
                wrong = bool(differs) or exact != [total] * len(ranks)
                failed += wrong
                experts = ", ".join(sorted(first["experts"])) or "none"
                print(
                    f"{'FAIL' if wrong else 'ok'} {name}, {layout_name}: {len(first['rows'])} "
                    f"kinds of weights, experts: {experts}; {'/'.join(map(str, exact))} of {total} "
                    "tensors to the bit (fp32 and bf16)"
                )
                if first["marked"]:
                    print(f"     marked by our table alone: {', '.join(sorted(first['marked']))}")
                for line in dict.fromkeys(differs):
                    print(f"     {line}")
                tables[f"{name}, {layout_name}"] = first["rows"]
        if backend.has_cuda() and torch.cuda.device_count() < 2:
            print("tiny, training state: not run, two GPUs are needed")
        else:
            exact = check_state(checkpoints["tiny"], Path(folder))
            failed += not exact
            print(
                f"{'ok' if exact else 'FAIL'} tiny, training state from TP2·EP2 to one rank and "
                "back: weights, fp32 weights and moments to the bit"
            )
    if options.write and not failed:
        te_layers.write(tables, {"versions": versions, "code_paths": paths})
        print(f"written: {te_layers.TABLE}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
