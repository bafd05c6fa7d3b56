"""Two vLLM servers as one engine, beside the Megatron trainer: `make test-engines`, on a CPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Qwen3MoeConfig

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout import handover
from moe_upgrpo.rollout.engines import make_engine
from tests.engines.test_vllm_server import Server, metric
from tests.engines.trainer import (
    MOE,
    agrees_with_trainer,
    move_weights,
    sample,
    saved,
    weights_of,
)


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    with pytest.MonkeyPatch.context() as patch, groups.process_groups(Layout()):
        patch.setenv("VLLM_API_KEY", "of-the-tests")
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("a"), Qwen3MoeConfig(**MOE), 0)


@pytest.fixture(scope="module")
def servers(model_dir, tmp_path_factory, process_groups):
    logs = [tmp_path_factory.mktemp("log") / f"{i}.log" for i in range(2)]
    with ThreadPoolExecutor() as pool:
        started = list(pool.map(lambda log: Server(model_dir, log), logs))
    yield started
    for server in started:
        server.kill()


def engine_on(servers, model_dir, lost="end", transfer="disk"):
    return make_engine(
        "vllm",
        model_dir,
        dtype="float32",
        device=torch.device("cpu"),
        max_tokens=128,
        url=",".join(server.url for server in servers),
        lost=lost,
        transfer=transfer,
    )


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("b"), Qwen3MoeConfig(**MOE), 1)


@pytest.mark.parametrize("transfer", ["disk", "distributed"])
def test_both_answer_as_the_trainer_through_updates(transfer, servers, model_dir, monkeypatch):
    """In fp32: log-probs and expert sets of every response, half of them from either server. Parts
    of 64 KiB, a twentieth of the weights."""
    monkeypatch.setattr(handover, "PART_BYTES", 64 << 10)
    torch.manual_seed(3)
    actor = MegatronActor(model_dir, Layout())
    engine = engine_on(servers, model_dir, transfer=transfer)
    for version in range(3):
        if version:
            move_weights(actor)
            engine.update_weights(actor.export_weights(), version=version)
        before = [answered(one) for one in engine._servers]
        rollouts = sample(engine, samples=6, seed=version)
        assert agrees_with_trainer(actor, rollouts) > 1000
        assert {r.weight_version for r in rollouts} == {version}
        shares = [answered(one) - n for one, n in zip(engine._servers, before, strict=True)]
        assert shares == [12, 12]
    engine.close()


def answered(one) -> float:
    return metric(one, "request_success_total")


def test_after_an_update_that_broke_off_the_next_one_is_whole(servers, model_dir, other_dir):
    """A tensor in the middle of a layer's experts does not fit. Without care the next load would
    leave experts of both weights, without an error."""
    actor = MegatronActor(model_dir, Layout())
    engine = engine_on(servers, model_dir, transfer="distributed")
    wrong = weights_of(other_dir)
    wrong["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError, match=r"has shape \(2, 2\).*nothing is sampled"):
        engine.update_weights(wrong.items(), version=1)
    with pytest.raises(MachineFault, match="half of"):
        sample(engine)
    engine.update_weights(actor.export_weights(), version=2)
    assert agrees_with_trainer(actor, sample(engine)) > 1000
    engine.close()


def test_a_server_that_took_other_weights_is_an_error_until_the_next_update(
    servers, model_dir, other_dir, monkeypatch
):
    engine = engine_on(servers, model_dir)
    second, load = engine._servers[1], engine._servers[1].load
    monkeypatch.setattr(second, "load", lambda _, version, digest: load(other_dir, version, digest))
    with pytest.raises(MachineFault, match=f"{second.url} took other weights than it was given"):
        engine.update_weights(weights_of(model_dir).items(), version=1)
    with pytest.raises(MachineFault, match="half of"):
        sample(second)
    monkeypatch.undo()
    engine.update_weights(weights_of(other_dir).items(), version=2)
    actor = MegatronActor(other_dir, Layout())
    assert agrees_with_trainer(actor, sample(engine)) > 1000
    engine.close()


def test_one_is_killed_and_the_run_ends_or_the_other_answers(servers, model_dir, capsys):
    """The last test here."""
    actor = MegatronActor(model_dir, Layout())
    ends = engine_on(servers, model_dir)
    goes_on = engine_on(servers, model_dir, "go-on")
    servers[1].kill()
    assert agrees_with_trainer(actor, sample(goes_on, samples=6)) > 1000
    assert goes_on.urls == [servers[0].url]
    assert capsys.readouterr().err.count("engine server lost, 1 of 2 left: vLLM at ") == 1
    goes_on.update_weights(weights_of(model_dir).items(), version=1)
    assert agrees_with_trainer(actor, sample(goes_on)) > 1000
    with pytest.raises(MachineFault, match=f"{servers[1].url} is not there"):
        ends.update_weights(weights_of(model_dir).items(), version=1)
