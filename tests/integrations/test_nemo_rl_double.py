"""NeMo-RL in every test run: losses, launcher, warnings, log, by the double of each revision."""

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks
from moe_upgrpo.integrations.nemo_rl import start
from moe_upgrpo.losses import PRESETS, policy_loss
from moe_upgrpo.store import read_metrics, read_routes, read_tokens
from tests.integrations import nemo_rl_recipe
from tests.integrations.nemo_rl_double import Batch, Config, installed, splits, write_worker
from tests.integrations.whole import assert_whole
from tests.ranks import run_ranks

REVISIONS = list(hooks.read()["nemo-rl"])


@pytest.fixture(params=REVISIONS)
def revision(request, checkout):
    with installed(request.param, checkout):
        yield request.param


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The file of the worker of a checkout that is not patched."""
    monkeypatch.setattr(start, "_said", set())
    for name in ("MOE_UPGRPO_RUN", "MOE_UPGRPO_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    write_worker(tmp_path, patched=False)
    return tmp_path


# --- losses


def data() -> Batch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0.0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    columns = {
        name: torch.randn(2, 5, generator=generator) / 3 - 2
        for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
    }
    return Batch(
        input_ids=torch.zeros(2, 5, dtype=torch.long),
        token_mask=mask,
        sample_mask=torch.ones(2),
        advantages=torch.tensor([[1.0], [-1.0]]).expand(2, 5),
        **columns,
    )


def test_presets_stand_in_the_place_of_the_loss(revision):
    from moe_upgrpo.integrations.nemo_rl import rebind
    from moe_upgrpo.integrations.nemo_rl.loss import LOSSES

    rebind()
    from nemo_rl.algorithms.loss import ClippedPGLossFn

    batch, totals = data(), (torch.tensor(2.0), torch.tensor(5.0))
    current = batch["prev_logprobs"][:, 1:] + 0.3
    for preset in LOSSES:
        loss_fn = pickle.loads(pickle.dumps(ClippedPGLossFn(Config(moe_upgrpo={"preset": preset}))))
        loss, metrics = loss_fn(current, batch, *totals)
        expected = policy_loss(
            current,
            batch["prev_logprobs"][:, 1:],
            batch["advantages"][:, 1:],
            batch["token_mask"][:, 1:] > 0,
            config=PRESETS[preset],
            rollout_log_probs=batch["generation_logprobs"][:, 1:],
            global_tokens=5.0,
            global_sequences=2.0,
        )
        assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert metrics["loss"] == pytest.approx(loss.item())
    with pytest.raises(UserError, match="preset: 'up' given"):
        ClippedPGLossFn(Config(moe_upgrpo={"preset": "up"}))


# --- what is missing is said at start


def launch(monkeypatch, folder: Path) -> None:
    from moe_upgrpo.integrations.nemo_rl import main

    script = folder / "run.py"
    script.write_text(
        "from nemo_rl.algorithms.loss import ClippedPGLossFn\n"
        "from nemo_rl.models.policy.lm_policy import Policy\n"
        "print(__name__, ClippedPGLossFn.__module__)\n"
        "Policy(None, {'megatron_cfg': {'enabled': True}, 'router_replay': {'enabled': True,"
        " 'observe_only': 'observe' in __import__('sys').argv}}, None)\n"
    )
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    main()


@pytest.mark.parametrize("patched", [False, True])
def test_the_launcher_says_that_the_patch_is_missing(
    revision, checkout, monkeypatch, capsys, patched
):
    monkeypatch.setattr(sys, "argv", ["", str(checkout / "run.py")])
    write_worker(checkout, patched=patched)
    launch(monkeypatch, checkout)
    out, err = capsys.readouterr()
    assert "__main__ moe_upgrpo.integrations.nemo_rl.loss" in out and not err
    monkeypatch.setenv("MOE_UPGRPO_RUN", str(checkout / "run"))
    monkeypatch.setattr(sys, "argv", ["", str(checkout / "run.py")])
    launch(monkeypatch, checkout)
    err = capsys.readouterr().err
    warned = f"{checkout} is not patched; moe-upgrpo patch apply nemo-rl --root {checkout}" in err
    assert warned != patched and err.count("WARNING") == warned


def test_observe_only_without_the_patch_is_refused(revision, checkout, monkeypatch):
    """NeMo-RL would replay."""
    monkeypatch.setattr(sys, "argv", ["", str(checkout / "run.py"), "observe"])
    with pytest.raises(SystemExit, match=r"observe_only=true given; .* patch apply nemo-rl"):
        launch(monkeypatch, checkout)


def test_the_driver_of_a_patched_checkout_looks_at_its_policies(
    revision, checkout, monkeypatch, capsys
):
    """Without the launcher: the patched grpo.py makes the loss."""
    write_worker(checkout, patched=True)
    from nemo_rl.models.policy.lm_policy import Policy

    from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn

    PolicyLossFn(Config()), PolicyLossFn(Config())
    megatron = {"megatron_cfg": {"enabled": True}}
    assert Policy(cluster=None, config=megatron, tokenizer=None).config is megatron
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MOE_UPGRPO_RUN", str(checkout / "run"))
    Policy(None, megatron | {"router_replay": {"enabled": True}}, None)
    assert capsys.readouterr().err == ""
    for config, what in [
        (megatron, "no routes come without policy.router_replay.enabled=true"),
        ({"dtensor_cfg": {"enabled": True}}, "it is one of Megatron workers"),
    ]:
        Policy(None, config, None)
        Policy(None, config, None)
        err = capsys.readouterr().err
        assert what in err and err.count("WARNING") == 1


def test_a_loss_that_leaves_the_old_forward_out_is_warned_of(
    revision, checkout, monkeypatch, capsys
):
    from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn

    PolicyLossFn(Config(force_on_policy_ratio=True))
    monkeypatch.setenv("MOE_UPGRPO_RUN", str(checkout / "run"))
    PolicyLossFn(Config())
    assert capsys.readouterr().err == ""
    PolicyLossFn(Config(force_on_policy_ratio=True))
    assert "unless grpo.seq_logprob_error_threshold is set" in capsys.readouterr().err


def worker(**changes) -> SimpleNamespace:
    config = nemo_rl_recipe.policy(REVISIONS[0])
    of_worker = {"delegate_pack_to_model": False, "_router_replay_enabled": True}
    return SimpleNamespace(cfg=config, **(of_worker | changes))


def test_what_the_log_does_not_cover_is_refused_by_name():
    def refused(of_worker, replay=None, fused=False):
        model = SimpleNamespace(moe_router_fusion=fused)
        found = start.not_covered(of_worker, model, replay or {"enabled": True})
        return [name for name, there in found.items() if there]

    assert refused(worker()) == []
    (name,) = refused(worker(delegate_pack_to_model=True))
    assert "sequence_packing.enabled=false is covered" in name
    plain = worker(delegate_pack_to_model=True)
    plain.cfg["sequence_packing"]["enabled"] = False
    assert refused(plain) == []
    (name,) = refused(worker(), {"enabled": True, "transport": "ray"})
    assert "transport=inline is covered" in name
    (name,) = refused(worker(), fused=True)
    assert "moe_router_fusion" in name
    assert refused(worker(_router_replay_enabled=False), fused=True) == []
    staged = worker()
    staged.cfg["megatron_cfg"]["virtual_pipeline_model_parallel_size"] = 2
    assert refused(staged) == ["policy.megatron_cfg.virtual_pipeline_model_parallel_size"]
    for modules, there in ((["attn"], False), (["moe_router"], True), ([], True)):
        graphs = worker()
        graphs.cfg["megatron_cfg"] |= {"cuda_graph_impl": "local", "cuda_graph_modules": modules}
        assert bool(refused(graphs)) == there


# --- the recipe


@pytest.mark.parametrize("name", REVISIONS)
def test_every_setting_of_the_r3_recipe_is_accepted(name):
    verdicts = nemo_rl_recipe.verdicts(name)
    assert len(verdicts) > 100 and set(verdicts.values()) == {""}


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("policy.megatron_cfg.virtual_pipeline_model_parallel_size", 2, "virtual_pipeline"),
        ("policy.router_replay.transport", "ray", "transport=inline is covered"),
        ("loss_fn.use_cispo", True, "take the preset cispo"),
        ("policy.router_replay.enabled", False, "no routes come"),
        ("policy.megatron_cfg.enabled", False, "Megatron workers"),
    ],
)
def test_a_setting_that_is_not_accepted_is_found(setting, value, why):
    assert why in nemo_rl_recipe.verdicts(REVISIONS[0], {setting: value})[setting]


@pytest.mark.skipif(
    not os.environ.get("MOE_UPGRPO_NEMO_RL"), reason="MOE_UPGRPO_NEMO_RL names no checkout"
)
def test_the_recipe_is_that_of_the_checkout():
    checkout = Path(os.environ["MOE_UPGRPO_NEMO_RL"])
    kept = nemo_rl_recipe.read()
    assert nemo_rl_recipe.of(checkout) in [kept[name] for name in REVISIONS]


# --- the log

L, K, E = 2, 2, 8
PLANTED = ((0, 3, 0), (3, 2, 1))  # sequence, route row, layer


def steps(revision: str, checkpoint, folder: Path, way: str) -> dict:
    """Two updates of a worker of the double, by `train` or by the split step."""
    os.environ["MOE_UPGRPO_RUN"] = str(folder / way)
    from moe_upgrpo.megatron import groups
    from moe_upgrpo.megatron.layout import Layout

    with groups.process_groups(Layout()), installed(revision, folder):
        from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

        from moe_upgrpo.integrations.nemo_rl.log import logged
        from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn

        # As Hydra resolves the recipe's ${policy.model_name}.
        named = {"model_name": str(checkpoint), "tokenizer": {"name": str(checkpoint)}}
        config = nemo_rl_recipe.policy(revision) | named
        config["router_replay"] = {"enabled": True, "observe_only": True}
        made = logged(MegatronPolicyWorkerImpl)(
            config, None, weights_path=checkpoint, worker_sharding_annotations=None
        )
        loss_fn = PolicyLossFn(Config(moe_upgrpo={"preset": "up-grpo"}))
        batch = rollouts()
        native = native_routes(made, batch)
        for sequence, row, layer in PLANTED:
            native[sequence, row, layer] = (native[sequence, row, layer] + 1) % E
        batch["routed_experts"] = native
        for _ in range(2):
            parts = [batch] if way == "train" else [batch.part(0, 2), batch.part(2, 4)]
            for i, part in enumerate(parts):
                found = made.get_logprobs(data=part)["logprobs"]
                part["prev_logprobs"] = part["reference_policy_logprobs"] = found
                if way == "train":
                    result = made.train(part, loss_fn, gbs=4, mbs=2)
                    continue
                if i == 0:
                    made.begin_train_step(loss_fn=loss_fn)
                made.train_microbatch(data=part)
            if way != "train":
                result = made.finish_train_step()
    return dict(result["all_mb_metrics"])


def rollouts() -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 6, 7, 5])
    at = torch.arange(7)
    return Batch(
        input_ids=torch.randint(2, 64, (4, 7), generator=generator),
        input_lengths=lengths,
        token_mask=((at >= 2) & (at < lengths[:, None])).float(),
        sample_mask=torch.ones(4),
        generation_logprobs=torch.rand(4, 7, generator=generator) - 4,
        advantages=torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]).expand(4, 7),
        total_reward=torch.arange(4) / 8,
    )


def native_routes(made, batch: Batch) -> torch.Tensor:
    """Choices of the routers of the worker, by Megatron's own maps: [B, S, L, K]."""
    maps, removed = [], []
    for module in made.model.modules():
        if type(module).__name__ == "TopKRouter":
            removed.append(module.register_forward_hook(lambda *a: maps.append(a[2][1])))
    ids = batch["input_ids"]
    with torch.no_grad():
        made.model(ids, torch.arange(7).expand(4, 7), None)
    for hook in removed:
        hook.remove()
    of_layers = [m.int().topk(K, dim=1).indices.view(7, 4, K).transpose(0, 1) for m in maps]
    return torch.stack(of_layers, dim=2)


@pytest.fixture(scope="module")
def logs(tiny_checkpoint, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """By revision and way, where a revision has it: the run folder."""
    found = {}
    for revision in REVISIONS:
        folder = tmp_path_factory.mktemp("double")
        for way in ("train", "chunks") if splits(revision) else ("train",):
            (metrics,) = run_ranks(1, steps, revision, tiny_checkpoint, folder, way)
            assert "mismatch/router_rate" in metrics
            found[revision, way] = folder / way
    return found


def test_each_revision_leaves_the_same_log(logs):
    ways = {way for _, way in logs}
    assert ways == {"train", "chunks"} and {name for name, _ in logs} == set(REVISIONS)
    first, *others = (read_tokens(folder / "tokens") for folder in logs.values())
    assert first.num_rows == 2 * (5 + 4 + 5 + 3)
    mismatched = np.array(first["layers_mismatched"].to_pylist()).reshape(2, -1)
    rollout, train = read_routes(first)
    assert mismatched[0].sum() == len(PLANTED) and rollout.shape[1:] == (L, K)
    differs = (np.sort(rollout, -1) != np.sort(train, -1)).any(-1)
    where = {(reward, position, layer)
             for reward, position, row in zip(first["reward"].to_pylist(),
                                              first["position"].to_pylist(), differs, strict=True)
             for layer in np.flatnonzero(row)}  # fmt: skip
    assert where >= {(sequence / 8, row + 1, layer) for sequence, row, layer in PLANTED}
    for other in others:
        for name in first.column_names:
            ours, theirs = (np.array(table[name].to_pylist()) for table in (other, first))
            if ours.dtype.kind == "f":
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
            else:
                assert np.array_equal(ours, theirs), name
    losses = [[row["loss/policy"] for row in read_metrics(folder)] for folder in logs.values()]
    for of_run in losses:
        assert of_run == pytest.approx(losses[0], rel=1e-4) and of_run[0] != of_run[1]


@pytest.mark.parametrize("way", ["train", "chunks"])
def test_the_record_is_whole(logs, way):
    assert_whole(next(folder for (_, name), folder in logs.items() if name == way))
