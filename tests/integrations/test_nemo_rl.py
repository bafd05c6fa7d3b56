"""NeMo-RL, a checkout that MOE_UPGRPO_NEMO_RL names: losses, launcher, patch, routing log; on CPUs.

Not run: Ray, vLLM, Megatron-Bridge, Transformer Engine, a GPU. What stands in: nemo_rl_ranks.py.
In a session of its own: the checkout's imports change transformers and leave stand-ins behind.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import GLOSSARY, PRESETS, finalize_metrics, policy_loss
from moe_upgrpo.megatron import backend
from moe_upgrpo.report import write_report
from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens

ROOT = os.environ.get("MOE_UPGRPO_NEMO_RL") or None
if not ROOT:
    pytest.skip(
        "MOE_UPGRPO_NEMO_RL names no checkout of NVIDIA-NeMo/RL (docs/nemo-rl.md has the revision)",
        allow_module_level=True,
    )

from tests.integrations import nemo_rl_stand_ins  # noqa: E402

nemo_rl_stand_ins.install(ROOT)

from nemo_rl.algorithms.loss import (  # noqa: E402
    ClippedPGLossConfig,
    SequencePackingLossWrapper,
    interfaces,
    prepare_loss_input,
    wrap_loss_fn_with_input_preparation,
)
from nemo_rl.algorithms.loss.interfaces import LossType  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn  # noqa: E402
from nemo_rl.distributed.batched_data_dict import BatchedDataDict  # noqa: E402

from moe_upgrpo.integrations.nemo_rl.loss import LOSSES, PolicyLossFn  # noqa: E402
from tests.integrations import nemo_rl_recipe  # noqa: E402
from tests.integrations.whole import assert_whole  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(ROOT, "nemo_rl/models/policy/workers/megatron_policy_worker.py").read_text()
SPLIT_STEP = "def begin_train_step" in WORKER  # v0.7.0 has no single controller
B, S, V = 6, 9, 12
LENGTHS = (9, 5, 7, 9, 4, 6)


@pytest.fixture(autouse=True)
def cpu():
    """NeMo-RL's own functions ask for CUDA."""
    with backend.apply():
        yield


def config(preset: str | None = None, settings: dict | None = None, **fields):
    if preset is not None:
        fields["moe_upgrpo"] = {"preset": preset} | (settings or {})
    return ClippedPGLossConfig(**({"reference_policy_kl_penalty": 0.0} | fields))


def batch(constant: bool = True) -> tuple[torch.Tensor, BatchedDataDict]:
    """Logits, and data as grpo.py makes them; a sequence that does not count, one without tokens.

    constant: one advantage for each sequence.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, ids = draw(B, S, V).float(), torch.randint(0, V, (B, S), generator=generator)
    current = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    current = torch.cat([torch.zeros(B, 1), current], dim=1).float()
    mask = torch.tensor([[float(2 <= t < n) for t in range(S)] for n in LENGTHS])
    mask[4] = 0
    advantages = draw(B, 1).expand(B, S) if constant else draw(B, S)
    data = {
        "input_ids": ids,
        "input_lengths": torch.tensor(LENGTHS),
        "advantages": advantages.float(),
        "prev_logprobs": current + 0.3 * draw(B, S).float(),
        "generation_logprobs": current + 0.4 * draw(B, S).float(),
        "reference_policy_logprobs": current + 0.2 * draw(B, S).float(),
        "token_mask": mask,
        "sample_mask": torch.tensor([1.0, 1, 0, 1, 1, 1]),
    }
    return logits, BatchedDataDict(data)


def dispatched(loss_fn, logits, data, seqs=5.0, toks=40.0):
    """Value, gradient of the logits, metrics, through NeMo-RL's own dispatch of a micro-batch."""
    leaf = logits.clone().requires_grad_()
    loss, metrics = wrap_loss_fn_with_input_preparation(
        leaf,
        data,
        torch.tensor(seqs),
        torch.tensor(toks),
        loss_fn=loss_fn,
        prepare_fn=prepare_loss_input,
    )
    loss.backward()
    return loss.item(), leaf.grad, metrics


def of_library(preset: str, logits, data, seqs=5.0, toks=40.0):
    leaf = logits.clone().requires_grad_()
    current = leaf.log_softmax(-1)[:, :-1].gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    result = policy_loss(
        current,
        data["prev_logprobs"][:, 1:],
        data["advantages"][:, 1:],
        (data["token_mask"] * data["sample_mask"][:, None])[:, 1:] > 0,
        config=PRESETS[preset],
        rollout_log_probs=data["generation_logprobs"][:, 1:],
        global_tokens=toks,
        global_sequences=seqs,
    )
    result.loss.backward()
    return result, leaf.grad


@pytest.mark.parametrize("preset", LOSSES)
def test_every_preset_gives_the_librarys_value_and_gradient(preset):
    logits, data = batch()
    expected, wanted = of_library(preset, logits, data)
    loss_fn = PolicyLossFn(config(preset))
    loss, grad, metrics = dispatched(loss_fn, logits, data)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)
    assert grad.count_nonzero() > 3
    by_token = PRESETS[preset].aggregation == "token-mean"
    assert loss_fn.loss_type == (LossType.TOKEN_LEVEL if by_token else LossType.SEQUENCE_LEVEL)
    # NeMo-RL adds the metrics of micro-batches up.
    values, tokens = finalize_metrics(expected.metrics), 40.0
    count = expected.metrics["ppo_kl"][1]
    for name, value in values.items():
        if GLOSSARY[name].normaliser == "response tokens":
            assert metrics[f"moe_upgrpo/{name}"] * tokens / count == pytest.approx(value, rel=1e-4)
        else:
            ends = [metrics[f"moe_upgrpo/{name}/{end}"] for end in ("numerator", "denominator")]
            assert GLOSSARY[name].value(*ends) == pytest.approx(value, rel=1e-4, nan_ok=True)
    for name in metrics:
        assert not SPLIT_STEP or name in loss_fn.metric_normalizations
    if SPLIT_STEP:
        kind = loss_fn.metric_normalizations["moe_upgrpo/ppo_kl"]
        assert kind is interfaces.MetricNormalizer.TOKENS


def test_presets_that_nemo_rl_has_the_inputs_for():
    # They look at the router, or at more of the batch than NeMo-RL hands over.
    needy = {"rspo", "up-rspo", "clip-cov", "up-clip-cov", "kl-cov", "up-kl-cov"}
    needy |= {"vapo", "real", "gtpo"}
    assert PRESETS.keys() - LOSSES.keys() == needy


WEIGHTS = [
    {},
    {"use_importance_sampling_correction": True},
    dict(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="tis",
        truncated_importance_sampling_ratio=1.2,
        truncated_importance_sampling_ratio_min=0.7,
    ),
    dict(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="icepop",
        truncated_importance_sampling_ratio=1.2,
        truncated_importance_sampling_ratio_min=0.7,
    ),
    dict(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="seq-mask-tis",
        truncated_importance_sampling_ratio=1.1,
        truncated_importance_sampling_ratio_min=0.9,
    ),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_against_nemo_rls_own_loss(weights, kl):
    """`grpo`, `gspo`, `gspo-token` and `cispo`, with its KL term and its weights."""
    fields = weights | {"reference_policy_kl_penalty": kl}
    by_sequence = dict(token_level_loss=False, sequence_level_importance_ratios=True)
    bounds = {"ratio_clip_min": 0.1, "ratio_clip_max": 0.15}
    cases = [
        ("grpo", False, bounds | {"ratio_clip_c": 1.4}, {}),
        ("cispo", False, bounds | {"use_cispo": True}, {"clip_low": 0.1, "clip_high": 0.15}),
    ]
    if weights.get("truncated_importance_sampling_type") != "seq-mask-tis":
        cases += [("gspo", True, bounds | by_sequence, {})]
        cases += [("gspo-token", True, bounds | by_sequence, {})]
    for preset, constant, theirs, settings in cases:
        logits, data = batch(constant)
        ours = {n: v for n, v in theirs.items() if n not in ("use_cispo",) and n not in settings}
        if preset == "cispo":
            ours = {}
        mine = PolicyLossFn(config(preset, settings, **(fields | ours)))
        reference = ClippedPGLossFn(config(None, **(fields | theirs)))
        loss, grad, metrics = dispatched(mine, logits, data)
        expected, wanted, wanted_metrics = dispatched(reference, logits, data)
        if preset == "cispo":  # its value is another, with the same gradient
            assert np.isfinite(loss)
        else:
            assert loss == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-7)
        for name in ("kl_penalty", "gen_kl_error", "sampling_importance_ratio", "approx_entropy"):
            assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-5, abs=1e-9)


def test_without_a_preset_it_is_nemo_rls_loss():
    logits, data = batch(constant=False)
    for fields in ({"ratio_clip_c": 3.0}, {"force_on_policy_ratio": True}):
        ours = dispatched(PolicyLossFn(config(None, **fields)), logits, data)
        theirs = dispatched(ClippedPGLossFn(config(None, **fields)), logits, data)
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]


def test_on_policy_ratio_needs_no_old_log_probs():
    logits, data = batch()
    loss_fn = PolicyLossFn(config("grpo", force_on_policy_ratio=True))
    _, grad, _ = dispatched(loss_fn, logits, data)
    current = logits.log_softmax(-1)[:, :-1].gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    data["prev_logprobs"] = torch.cat([torch.zeros(B, 1), current], dim=1)
    _, wanted = of_library("grpo", logits, data)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", ["up-grpo", "gspo", "topr"])
def test_micro_batches_and_packed_sequences_add_up(preset):
    """NeMo-RL's wrapper for packed sequences calls the loss for each, with the global counts."""
    logits, data = batch()
    loss_fn = PolicyLossFn(config(preset))
    whole, grad, whole_metrics = dispatched(loss_fn, logits, data)
    ends = torch.tensor([0, *np.cumsum(LENGTHS)])
    leaf = torch.cat([logits[i, :n] for i, n in enumerate(LENGTHS)])[None].requires_grad_()
    wrapper = SequencePackingLossWrapper(loss_fn, prepare_loss_input, ends)
    loss, metrics = wrapper(leaf, data, torch.tensor(5.0), torch.tensor(40.0))
    loss.backward()
    assert loss.item() == pytest.approx(whole, rel=1e-5)
    expected = torch.cat([grad[i, :n] for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(leaf.grad[0], expected, rtol=1e-4, atol=1e-7)
    for name in ("moe_upgrpo/ppo_kl", "moe_upgrpo/positive_fraction", "loss"):
        assert metrics[name] == pytest.approx(whole_metrics[name], rel=1e-4)


def test_what_cannot_be_is_refused():
    def refused(message, preset="up-grpo", settings=None, **fields):
        with pytest.raises(UserError, match=message):
            PolicyLossFn(config(preset, settings, **fields))

    refused("preset: 'up' given; allowed: grpo", "up")
    refused("clip_lo.* given; allowed: fields of positive", settings={"clip_lo": 0.1})
    refused("ratio_clip_min: 0.05 given; dppo-tv has no clip_low", "dppo-tv", ratio_clip_min=0.05)
    refused(
        "router_shift_floor.* given; this loss needs router_log_probs",
        "gmpo",
        {"router_shift_floor": 0.8},
    )
    refused("use_cispo: given with the preset up-grpo", use_cispo=True)
    refused("averaged over tokens", sequence_level_importance_ratios=True, token_level_loss=False)
    weighted = {"use_importance_sampling_correction": True}
    refused("set loss_fn.sequence_level_importance_ratios", "gspo", **weighted)
    refused("would do it twice", "topr", **weighted)
    refused("twice", settings={"correction": {"weight": "token-tis"}}, **weighted)


def fresh(*command: str, cwd: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=550,
    )


def test_the_launcher_binds_the_name_that_the_trainers_import(tmp_path):
    """A script in the place of examples/run_grpo.py, which needs Ray and a GPU."""
    script = tmp_path / "run.py"
    script.write_text(
        "import pickle, sys\n"
        "from nemo_rl.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn\n"
        "loss = ClippedPGLossFn(ClippedPGLossConfig(moe_upgrpo={'preset': sys.argv[1]}))\n"
        "print(__name__, pickle.loads(pickle.dumps(loss)).config.positive, type(loss).__module__)\n"
    )
    launch = (
        "import sys; from tests.integrations import nemo_rl_stand_ins; nemo_rl_stand_ins.install();"
        f"sys.argv = ['', {str(script)!r}, sys.argv[1]];"
        "from moe_upgrpo.integrations.nemo_rl import main; main()"
    )
    done = fresh("-c", launch, "up-grpo", cwd=tmp_path)
    last = done.stdout.splitlines()[-1:]
    assert last == ["__main__ log-likelihood moe_upgrpo.integrations.nemo_rl.loss"], done.stderr
    done = fresh("-c", launch, "up", cwd=tmp_path)
    assert done.returncode == 1 and "preset: 'up' given" in done.stderr


def test_nemo_rls_config_takes_the_flags():
    """The documented flags through NeMo-RL's own loader and overrides."""
    from nemo_rl.utils.config import load_config, parse_hydra_overrides
    from omegaconf import OmegaConf

    found = load_config(f"{ROOT}/examples/configs/grpo_math_1B_megatron.yaml")
    overrides = ["++loss_fn.moe_upgrpo.preset=up-grpo", "++loss_fn.moe_upgrpo.clip_low=0.1",
                 "++policy.router_replay.enabled=true",
                 "++policy.router_replay.observe_only=true"]  # fmt: skip
    found = OmegaConf.to_container(parse_hydra_overrides(found, overrides), resolve=False)
    assert found["policy"]["router_replay"] == {"enabled": True, "observe_only": True}
    loss_fn = PolicyLossFn(ClippedPGLossConfig(**found["loss_fn"]))
    assert (loss_fn.config.positive, loss_fn.config.clip_low) == ("log-likelihood", 0.1)


def test_nemo_rls_own_loss_tests_pass(tmp_path):
    """As they do without us, on a CPU in the place of their GPU: `ClippedPGLossFn` bound to ours.

    At 7ea279a ten of 76 fail in both, those of other losses: NLL, DPO, distillation.
    """
    results = {}
    for rebind in ("", "1"):
        done = fresh(
            "-m", "pytest", "-q", "--noconftest", "-p", "nemo_rl_stand_ins", "-p",
            "no:cacheprovider", "-o", "addopts=", "-o", "markers=", "--rootdir", str(tmp_path),
            "-rA", f"{ROOT}/tests/unit/algorithms/test_loss_functions.py",
            cwd=tmp_path, MOE_UPGRPO_NEMO_RL_PLUGIN="1", MOE_UPGRPO_REBIND=rebind,
            PYTHONPATH=f"{Path(__file__).parent}:{REPOSITORY}",
        )  # fmt: skip
        lines = done.stdout.splitlines()
        results[rebind] = {line for line in lines if line.startswith("PASSED")}
    assert results["1"] == results[""] and len(results["1"]) > 50, results


# --- the patch


def test_the_patch(tmp_path, monkeypatch):
    """On a copy of the checkout: applied, imported, reverted to the last bit; others refused."""
    from moe_upgrpo import patching

    root, site = tmp_path / "checkout", tmp_path / "site"
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(ROOT) / "nemo_rl", root / "nemo_rl", ignore=no_caches)
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "from tests.integrations import nemo_rl_stand_ins as stand_ins\n"
        "stand_ins.install(), stand_ins.install_worker()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{REPOSITORY}")
    monkeypatch.setenv("MOE_UPGRPO_NEMO_RL", str(root))

    def found():
        return patching.find("nemo-rl", root, sys.executable)

    if found().state != "clean":
        found().revert()
    series = found().series
    before = {file: (root / file).read_bytes() for file in series.files}
    assert found().apply() == series.files and found().state == "applied"
    assert found().apply() == []
    worker = "nemo_rl.models.policy.workers.megatron_policy_worker"
    modules = [file.removesuffix(".py").replace("/", ".") for file in series.files]
    assert {"nemo_rl.algorithms.grpo", worker} < set(modules)
    assert found().verify(sys.executable) == modules
    makers = ["grpo", *(["single_controller_utils.setup"] if SPLIT_STEP else [])]
    code = (
        "from importlib import import_module as load; import os;"
        "from moe_upgrpo.integrations import nemo_rl_worker; from nemo_rl.data_plane import schema;"
        f"os.environ['MOE_UPGRPO_RUN'] = {str(tmp_path / 'run')!r};"
        "from moe_upgrpo.integrations.nemo_rl import start; start.warn_of_missing_patch();"
        f"print(load({worker!r}).logged is nemo_rl_worker.logged, schema.DP_TRAIN_FIELDS[-1],"
        f"*(load('nemo_rl.algorithms.' + n).ClippedPGLossFn.__name__ for n in {makers}))"
    )
    done = fresh("-c", code, cwd=tmp_path, PYTHONPATH=os.environ["PYTHONPATH"])
    expected = ["True", "total_reward", *["PolicyLossFn"] * len(makers)]
    assert done.stdout.split()[-len(expected) :] == expected, done.stderr[-2000:]
    assert "not patched" not in done.stderr
    assert found().revert() == series.files and found().state == "clean"
    assert {file: (root / file).read_bytes() for file in series.files} == before
    (root / series.files[0]).write_text("changed = 1\n")
    with pytest.raises(patching.UnknownRevision, match=r"none with patches: 7ea279a .*v0\.7\.0"):
        found()
    (root / ".git").mkdir()
    (root / ".git/HEAD").write_text("f" * 40)
    with pytest.raises(patching.UnknownRevision, match=r"at fff.* 7ea279a \(7ea279abfb\) or v0"):
        found()


# --- the routing log

L, K, E = 2, 2, 8
CHANGED = ((0, 3, 0), (2, 4, 1), (4, 3, 0), (6, 4, 1), (7, 3, 0))  # sequence, route row, layer
MISSING = ((1, 3), (6, 5))  # sequence, route row
UNCOUNTED = 5


def sequences(checkpoint) -> list[dict]:
    """Prompts and responses, with the experts that transformers chooses, changed at `CHANGED`."""
    from transformers import Qwen3MoeForCausalLM

    generator = np.random.default_rng(0)
    hf = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = []
    for i in range(8):
        prompt, response = (
            generator.integers(2, 64, size=n).tolist() for n in (2 + i % 3, 4 + i % 4)
        )
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = hf(ids, output_router_logits=True).router_logits
        routes = torch.stack([x.topk(K).indices for x in logits], dim=1)[:-1].tolist()
        native = [[list(layer) for layer in row] for row in routes]
        for sequence, row, layer in CHANGED:
            if sequence == i:
                used = routes[row][layer]
                routes[row][layer] = [e for e in range(E) if e not in used][:K]
        for sequence, row in MISSING:
            if sequence == i:
                routes[row] = [[-1] * K] * L
        found.append(
            {
                "prompt": prompt,
                "response": response,
                # one token that is not the model's own, such as a tool's
                "mask": [float(not (i == 3 and t == 1)) for t in range(len(response))],
                "counts": i != UNCOUNTED,
                "logp_rollout": (-generator.random(len(response)) - 3).round(3).tolist(),
                "advantage": [1.0, -1.0, 0.5, -0.5][i % 4],
                "reward": i / 8,  # says in the log which sequence it is
                "routes": [*routes, [list(range(K))] * L],  # NeMo-RL's padding of the last row
                "native": native,
            }
        )
    return found


OBSERVE, REPLAY = {"enabled": True, "observe_only": True}, {"enabled": True}
UP = {"moe_upgrpo": {"preset": "up-grpo"}, "reference_policy_kl_penalty": 0.01}
OWN = {"reference_policy_kl_penalty": 0.01, "ratio_clip_c": 3.0}
SIZES = {
    "stages": {"pipeline_model_parallel_size": 2},
    "experts": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "replicas": {"expert_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},  # packed, as in NeMo-RL's R3 recipe
}


@dataclass
class Job:
    """way: through the worker: two updates of a batch, one, or one whose batch comes in chunks.

    Either with the batch, or from the data plane. stand_ins: what nemo_rl_ranks.py has of models
    that do not run here.
    """

    world: int
    sizes: str | None
    replay: dict
    packed: bool = True
    loss: dict = field(default_factory=lambda: UP)
    steps: int = 1
    stand_ins: list[str] = field(default_factory=list)
    way: str = "two updates"


JOBS = {
    "observe": Job(1, None, OBSERVE, steps=2),
    "unpacked": Job(2, None, OBSERVE, packed=False, loss=OWN),  # two data-parallel ranks, padded
    "stages": Job(2, "stages", OBSERVE, loss=OWN, stand_ins=["fused"]),
    "R3": Job(2, "experts", REPLAY),
    "replicas": Job(2, "replicas", REPLAY, loss=OWN),
    "cp": Job(2, "cp", REPLAY),
    "draft": Job(2, "cp", OBSERVE, stand_ins=["draft", "slices"] if SPLIT_STEP else ["draft"]),
    "one update": Job(1, None, REPLAY, way="one update"),
    "data plane": Job(2, "replicas", REPLAY, way="data plane"),
}
if SPLIT_STEP:
    JOBS["chunks"] = Job(2, "replicas", REPLAY, way="data plane in chunks")
    JOBS["own in chunks"] = Job(2, "stages", OBSERVE, loss=OWN, way="chunks")
ONE_UPDATE = [name for name, job in JOBS.items() if job.way != "two updates"]


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tmp_path_factory):
    """Steps of NeMo-RL's worker in each layout: run folders, and what each rank returned."""
    folder, batch = tmp_path_factory.mktemp("nemo"), sequences(tiny_checkpoint)
    jobs = {
        name: dict(world=job.world, sequences=batch, sizes=SIZES.get(job.sizes, {}),
                   replay=job.replay, packed=job.packed, loss=job.loss, steps=job.steps,
                   stand_ins=job.stand_ins, way=job.way)
        for name, job in JOBS.items()
    }  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = fresh(
        "-m", "tests.integrations.nemo_rl_ranks", str(tiny_checkpoint), str(folder), cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = pickle.loads((folder / "results.pkl").read_bytes())
    for name, ranks in results.items():
        assert all(isinstance(rank, dict) for rank in ranks), f"{name}: {ranks[0]}"
    return folder, batch, results


def rows_of(batch) -> list[tuple[int, int]]:
    """(sequence, position) of every token that counts and whose routes are there."""
    return [
        (i, len(s["prompt"]) + t)
        for i, s in enumerate(batch)
        for t, m in enumerate(s["mask"])
        if m and s["counts"] and (i, len(s["prompt"]) + t - 1) not in MISSING
    ]


def of_step(folder: Path, step: int = 1):
    """The token rows in the order of `rows_of`, the columns, and both sides' routes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_tokens(folder / "tokens")
    table = table.filter(pc.equal(table["step"], step))
    index = [round(8 * reward) for reward in table["reward"].to_pylist()]
    table = table.append_column("index", pa.array(index)).sort_by(
        [("index", "ascending"), ("position", "ascending")]
    )
    rollout, train = read_routes(table)
    names = [n for n in table.column_names if "experts" not in n]
    return {n: np.array(table[n].to_pylist()) for n in names}, rollout, train


def test_the_runs_that_the_docs_name_for_the_recipe_are_here():
    said = " ".join(nemo_rl_recipe.SHOWN.values())
    named = {word for word in re.findall("`(.*?)`", said)}
    assert len(named) > 4 and named <= JOBS.keys()
    assert nemo_rl_recipe.SHOWN.keys() <= nemo_rl_recipe.read()["7ea279a"]["own"].keys()


@pytest.mark.parametrize("name", JOBS)
def test_the_record_is_whole(runs, name):
    assert_whole(runs[0] / name)


@pytest.mark.parametrize("name", JOBS)
def test_the_token_log_of_a_step(runs, name):
    folder, batch, results = runs
    column, rollout, train = of_step(folder / name)
    expected = rows_of(batch)
    assert list(zip(column["index"], column["position"], strict=True)) == expected
    of = [batch[i] for i, _ in expected]
    given = np.array([s["routes"][p - 1] for s, (_, p) in zip(of, expected, strict=True)])
    native = np.array([s["native"][p - 1] for s, (_, p) in zip(of, expected, strict=True)])
    assert np.array_equal(np.sort(rollout, -1), np.sort(given, -1))
    tokens = [(s["prompt"] + s["response"])[p] for s, (_, p) in zip(of, expected, strict=True)]
    assert column["token_id"].tolist() == tokens
    logp = [s["logp_rollout"][p - len(s["prompt"])] for s, (_, p) in zip(of, expected, strict=True)]
    np.testing.assert_allclose(column["logp_rollout"], logp, rtol=1e-6)
    np.testing.assert_allclose(column["advantage"], [s["advantage"] for s in of])

    # The trainer's routes are those of transformers, and differences are where they were put.
    assert np.array_equal(np.sort(train, -1), np.sort(native, -1))
    changed = {(i, row + 1, layer) for i, row, layer in CHANGED}
    is_changed = np.array([[(i, p, m) in changed for m in range(L)] for i, p in expected])
    assert is_changed.sum() == len(CHANGED)
    assert np.array_equal(column["overlap"], np.where(is_changed, 0, K))

    row = read_metrics(folder / name)[0]
    assert row["mismatch/router_numerator"] == len(CHANGED)
    assert row["mismatch/router_denominator"] == 2 * len(expected)
    reported = results[name][0]["metrics"]
    if name != "observe":  # of the last of two steps
        assert reported["mismatch/router_rate"] == [row["mismatch/router_rate"]]
    assert reported["mismatch/tokens_without_routes"] == [len(MISSING)]
    said = [rank["metrics"].get("mismatch/router_numerator") for rank in results[name]]
    # NeMo-RL's driver adds up what it hears from each replica's first stage and tensor rank.
    heard = [True, JOBS[name].sizes == "stages"][: JOBS[name].world]
    assert [s is not None for s in said] == heard
    run = read_config(folder / name)
    assert run["replay"] == ("R3" if JOBS[name].replay == REPLAY else "none")
    assert run["stack"].startswith("NeMo-RL ")
    assert run["loss"] == (
        "moe_upgrpo/up-grpo" if JOBS[name].loss == UP else "ClippedPGLossFn of NeMo-RL"
    )


@pytest.mark.parametrize("name", ["observe", "unpacked", "R3", "cp", *ONE_UPDATE])
def test_clipped_and_gradient_weight(runs, name):
    """From the log's own ratios by the formulas of PPO and UP, each token's weight being 1/N."""
    folder, batch, _ = runs
    column, _, _ = of_step(folder / name)
    r, a = column["ratio"], column["advantage"]
    cut = (a < 0) & ((r < 0.8) | (r > 3)) | (a > 0) & (r > 1.2)
    weight = np.where(cut, 0, np.abs(a) * r)
    if JOBS[name].loss == UP:
        cut, weight = cut & (a < 0), np.where(a > 0, a, weight)
    assert np.array_equal(column["clipped"], cut)
    second = (column["index"] >= 4) & (name not in ONE_UPDATE)
    assert np.abs(r[~second] - 1).max() < 1e-4  # the first optimizer step is at the old weights
    assert name in ONE_UPDATE or (np.abs(r[second] - 1) > 1e-4).mean() > 0.9
    counts = [sum(sum(s["mask"]) * s["counts"] for s in half) for half in (batch[:4], batch[4:])]
    if name in ONE_UPDATE:
        counts = [sum(counts)] * 2
    np.testing.assert_allclose(
        column["gradient_weight"], weight / np.where(second, *counts[::-1]), rtol=1e-4, atol=1e-7
    )


SAME = [("cp", "R3"), ("draft", "observe"), ("data plane", "one update")]
if SPLIT_STEP:
    SAME.append(("chunks", "one update"))


@pytest.mark.parametrize(("wide", "plain"), SAME)
def test_a_wide_configuration_leaves_the_plain_ones_log(runs, wide, plain):
    """Context-parallel shards, a model that slices its inputs, a draft model, chunks."""
    folder, _, _ = runs
    (column, *routes), (expected, *given) = of_step(folder / wide), of_step(folder / plain)
    assert column.keys() == expected.keys() and len(column["index"]) > 20
    for ours, theirs in zip(routes, given, strict=True):
        assert np.array_equal(np.sort(ours, -1), np.sort(theirs, -1))
    for name in column.keys() - {"sequence", "prompt"}:  # counted over ranks, in their order
        if column[name].dtype.kind == "f":
            np.testing.assert_allclose(column[name], expected[name], rtol=1e-3, atol=2e-4)
        else:
            assert np.array_equal(column[name], expected[name]), name
    row, like = (read_metrics(folder / name)[0] for name in (wide, plain))
    assert row.keys() == like.keys()
    for name in ("loss/policy", "logp_gap/mean_abs", "clip/negative", "tokens/visited"):
        assert row[name] == pytest.approx(like[name], rel=1e-3, abs=1e-6)


@pytest.mark.skipif(not SPLIT_STEP, reason="v0.7.0 has no single controller")
def test_chunks_train_as_one_batch(runs):
    """The single controller's parameters after the step, and what NeMo-RL hears of it."""
    _, _, results = runs
    (whole,), (twice,) = results["one update"], results["observe"]
    for rank in results["chunks"]:
        assert rank["parameters"] == pytest.approx(whole["parameters"], rel=1e-5)
        assert rank["parameters"] != pytest.approx(twice["parameters"], rel=1e-5)
    heard = [m for rank in results["chunks"] for m in rank["metrics"].get("moe_upgrpo/ppo_kl", [])]
    assert len(heard) >= 2


def test_steps(runs):
    folder, batch, _ = runs
    first, second = read_metrics(folder / "observe")
    assert (first["step"], second["step"]) == (1, 2)
    assert first["tokens/sampled"] == second["tokens/sampled"] == len(rows_of(batch))
    assert second["logp_gap/mean_abs"] != first["logp_gap/mean_abs"]


@pytest.mark.parametrize("name", [n for n, job in JOBS.items() if job.replay == REPLAY])
def test_r3_tells_native_from_held(runs, name):
    """The held forward is replayed, the native one is not, and observing changes nothing."""
    folder, batch, _ = runs
    column, _, _ = of_step(folder / name)
    native, _, _ = of_step(folder / "observe")
    total = column["gap_numerics"] + column["gap_update"]
    np.testing.assert_allclose(total, column["logp_train"] - column["logp_rollout"], atol=1e-5)
    without = column["logp_old"] + column["counterfactual_engine_routing"]
    np.testing.assert_allclose(without, native["logp_old"], atol=2e-4)
    moved = np.abs(column["counterfactual_engine_routing"])
    at = {(i, row + 1) for i, row, _ in CHANGED}
    changed = np.array([pair in at for pair in rows_of(batch)])
    assert moved[changed].min() > 0.01 > np.median(moved[~changed])
    before = np.array([p < min([r + 1 for j, r, _ in CHANGED if j == i], default=99)
                       for i, p in rows_of(batch)])  # fmt: skip
    assert moved[before].max() < 1e-4 and before.sum() > 5
    assert (column["layers_mismatched_conditional"][changed] >= 1).all()
    (row,) = read_metrics(folder / name)
    assert row["conditional/router_rate"] == pytest.approx(
        column["layers_mismatched_conditional"].sum() / (L * len(changed))
    )


def test_health_figures_of_a_replay(runs):
    """By `train`, of all rows of its forwards; padding is held to experts in turn."""
    _, batch, results = runs
    for name in [name for name, job in JOBS.items() if job.replay != REPLAY]:
        for rank in results[name]:
            assert not any(key.startswith("replay/") for key in rank["metrics"])
    for name in ("R3", "replicas"):
        heard = [rank["metrics"] for rank in results[name] if "replay/rows" in rank["metrics"]]
        assert len(heard) == 1
        found = {k.removeprefix("replay/"): v[0] for k, v in heard[0].items() if "replay/" in k}
        tokens = sum(len(s["prompt"] + s["response"]) for s in batch)
        assert found["rows"] >= L * tokens
        assert found["live_rate"] == pytest.approx(L * len(MISSING) / found["rows"])
        assert found["applied_rate"] == pytest.approx(1 - found["live_rate"])
        assert found["zero_filled_rate"] == found["repeated_rate"] == 0
        planted = sum(layer == 0 for *_, layer in CHANGED) / tokens
        assert 0.7 * planted < found["native_differs/layer_0"]


def test_the_report_opens_the_run(runs):
    folder, _, _ = runs
    page = write_report([folder / "R3"], folder / "report.html").read_text()
    assert "NeMo-RL" in page and "Replay" in page
