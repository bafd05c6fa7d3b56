"""Several servers as one engine: prompts shared out, the same weights for all, and one lost."""

import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.rollout import SamplingConfig, handover
from moe_upgrpo.rollout.beside import hand_over
from moe_upgrpo.rollout.digest import Digest
from moe_upgrpo.rollout.engines import make_engine
from tests.ranks import run_ranks
from tests.rollout.stand_ins import KEY, server, sglang, tokens_of, vllm

STAND_INS = {"vllm": (vllm, "/inference/v1/generate"), "sglang": (sglang, "/generate")}


@pytest.fixture(params=STAND_INS)
def kind(request, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    return request.param


@contextmanager
def engine_on(kind, model_dir, count=2, lost="end", transfer="disk"):
    """An engine on `count` stand-ins, and of each its state: `asked`, `hook`, `gone`."""
    stand_in, _ = STAND_INS[kind]
    states = [{"asked": [], "hook": None, "gone": False} for _ in range(count)]

    def answering(state):
        answer = stand_in(model_dir, state)

        def hooked(path, body):
            state["asked"].append((path, body))
            if state["hook"]:
                state["hook"](path, body)
            return None if state["gone"] else answer(path, body)

        return hooked

    with ExitStack() as stack:
        urls = [stack.enter_context(server(answering(state)))[0] for state in states]
        engine = made(kind, model_dir, urls, lost, transfer)
        yield SimpleNamespace(engine=engine, states=states, urls=urls)
        engine.close()


def made(kind, model_dir, urls, lost="end", transfer="disk"):
    return make_engine(
        kind,
        model_dir,
        dtype="float32",
        device=torch.device("cpu"),
        max_tokens=16,
        url=",".join(urls),
        lost=lost,
        transfer=transfer,
    )


PROMPTS = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6]), np.array([7, 8]), np.array([9])]


def sample(engine, seed=0):
    return engine.generate(
        PROMPTS, SamplingConfig(max_new_tokens=3), samples_per_prompt=2, seed=seed
    )


def tokens(rollouts):
    return [(r.prompt_ids.tolist(), r.response_ids.tolist()) for r in rollouts]


def by_hand(seed=0):
    seeds = np.random.SeedSequence(seed).generate_state(10, np.uint64) >> 1
    return [(PROMPTS[i // 2].tolist(), tokens_of(int(s), 3)) for i, s in enumerate(seeds)]


def prompts_asked(kind, state, since):
    """The prompts of the requests for samples, each once."""
    field = {"vllm": "token_ids", "sglang": "input_ids"}[kind]
    asked = [body for path, body in state["asked"][since:] if path == STAND_INS[kind][1]]
    found = [body[field] if kind == "vllm" else body[field][0] for body in asked]
    return sorted({tuple(prompt) for prompt in found})


def test_prompts_are_shared_out_and_answers_come_in_their_order(kind, tiny_checkpoint):
    """Prompts 0, 2, 4 to the first and 1, 3 to the second, whichever answers first; the seeds are
    those of one server alone."""
    with engine_on(kind, tiny_checkpoint) as one:
        for slow in (0, 1):
            one.states[slow]["hook"] = lambda path, body: time.sleep(0.05)
            one.states[1 - slow]["hook"] = None
            since = [len(state["asked"]) for state in one.states]
            assert tokens(sample(one.engine)) == by_hand()
            shares = [prompts_asked(kind, *given) for given in zip(one.states, since, strict=True)]
            assert shares == [[(1, 2), (4, 5, 6), (9,)], [(3,), (7, 8)]]
        assert tokens(sample(one.engine, seed=1)) == by_hand(1) != by_hand()
        routes = one.engine.routes([np.arange(4), np.arange(7), np.arange(3)])
        assert [r.shape for r in routes] == [(3, 2, 2), (6, 2, 2), (2, 2, 2)]
        assert one.engine.moe_layer_ids == (0, 1) and one.engine.health()


def weights_of(model_dir, add=0.0):
    return {n: t + add for n, t in load_file(model_dir / "model.safetensors").items()}


def digest(weights):
    found = Digest()
    for name, tensor in weights.items():
        found.add(name, tensor)
    return found.value()


@pytest.mark.parametrize("transfer", ["disk", "distributed"])
def test_all_take_the_same_weights_at_the_same_time(transfer, kind, tiny_checkpoint, monkeypatch):
    """Each waits here for the other. Over the network in parts of 32 KiB."""
    monkeypatch.setattr(handover, "PART_BYTES", 32 << 10)
    with engine_on(kind, tiny_checkpoint, transfer=transfer) as one:
        loads = {"/collective_rpc", "/update_weights_from_disk", "/begin_weight_update"}
        both = threading.Barrier(2, timeout=20)
        for state in one.states:
            state["hook"] = lambda path, body: path in loads and both.wait()
        new = weights_of(tiny_checkpoint, 0.5)
        one.engine.update_weights(iter(new.items()), version=1)
        assert [state["digests"][-1] for state in one.states] == [digest(new)] * 2
        assert digest(new) != one.states[0]["digests"][0] == digest(weights_of(tiny_checkpoint))
        assert {r.weight_version for r in sample(one.engine)} == {one.engine.weight_version} == {1}


@pytest.mark.fault(
    "Servers and other people's files",
    "an engine server falls away in the middle of the weights that are sent to it",
    "one message; with --engine-lost go-on the others take all of them",
)
def test_a_server_that_falls_away_in_mid_transfer(tiny_checkpoint, monkeypatch, capsys):
    """vLLM: after some tensors of many parts the third of three takes no more of them."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(handover, "PART_BYTES", 8 << 10)
    new = weights_of(tiny_checkpoint, 0.5)
    for lost in ("go-on", "end"):
        with engine_on("vllm", tiny_checkpoint, 3, lost, "distributed") as one:
            left = iter(range(5))
            one.states[2]["goes on"] = lambda _, left=left: next(left, None) is not None
            seen = []
            given = ((seen.append(name), (name, tensor))[1] for name, tensor in new.items())
            if lost == "end":
                with pytest.raises(MachineFault, match=f"at {one.urls[2]} is not there"):
                    one.engine.update_weights(given, version=1)
            else:
                one.engine.update_weights(given, version=1)
                assert one.engine.urls == one.urls[:2]
                assert tokens(sample(one.engine)) == by_hand()
                assert capsys.readouterr().err.count("engine server lost, 2 of 3 left") == 1
            assert len(seen) == len(new)
            assert [state["digests"][1:] for state in one.states] == [[digest(new)]] * 2 + [[]]


def test_weights_that_do_not_fit_are_broken_off(kind, tiny_checkpoint, monkeypatch):
    """All tensors are gone through; nothing is sampled until weights are whole again."""
    monkeypatch.setattr(handover, "PART_BYTES", 8 << 10)
    new = weights_of(tiny_checkpoint, 0.5)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    wrong = new | {name: torch.zeros(2, 2)}
    with engine_on(kind, tiny_checkpoint, transfer="distributed") as one:
        left = iter(wrong.items())
        with pytest.raises(UserError, match=rf"{name} has shape \(2, 2\).*nothing is sampled"):
            one.engine.update_weights(left, version=1)
        assert not list(left)
        with pytest.raises(UserError, match=r"half of|failed half-way"):
            sample(one.engine)
        one.engine.update_weights(new.items(), version=2)
        if kind == "vllm":  # else the next load would complete the one that broke off
            asked = [body.get("method") for _, body in one.states[0]["asked"]]
            asked = [method for method in asked if method]
            assert asked == ["take_stream"] * 2 + ["reload_weights", "take_stream"]
        assert [state["digests"][-1] for state in one.states] == [digest(new)] * 2
        assert {r.weight_version for r in sample(one.engine)} == {2}


MOMENTS = ("while it samples", "between two calls", "during an update")


def lose_at(moment, kind, state):
    """From that moment on it closes every connection."""
    if moment == "between two calls":
        state["gone"] = True
        return
    paths = {
        "while it samples": (STAND_INS[kind][1],),
        "during an update": ("/collective_rpc", "/update_weights_from_disk"),
    }[moment]

    def hook(path, body):
        state["gone"] |= path in paths

    state["hook"] = hook


@pytest.mark.fault(
    "Servers and other people's files",
    "one of several engine servers falls away",
    "one message that names it; the run ends, or with --engine-lost go-on the others answer",
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_lost_server_ends_the_run(moment, kind, tiny_checkpoint):
    with engine_on(kind, tiny_checkpoint) as one:
        lose_at(moment, kind, one.states[1])
        with pytest.raises(MachineFault, match=f"at {one.urls[1]} is not there"):
            one.engine.update_weights(weights_of(tiny_checkpoint, 1.0).items(), version=1)
            sample(one.engine)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_others_answer_in_its_place(moment, kind, tiny_checkpoint, capsys):
    with engine_on(kind, tiny_checkpoint, 3, "go-on") as one:
        lose_at(moment, kind, one.states[1])
        for version in (1, 2):
            one.engine.update_weights(weights_of(tiny_checkpoint, version).items(), version=version)
            assert tokens(sample(one.engine, seed=version)) == by_hand(version)
        assert one.engine.urls == [one.urls[0], one.urls[2]]
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("engine server lost, 2 of 3 left: ")
        assert f"{one.urls[1]} is not there" in said
        for state in one.states:
            state["gone"] = True
        with pytest.raises(MachineFault, match="is not there"):
            sample(one.engine)


@pytest.mark.fault(
    "Servers and other people's files",
    "an engine server took other weights than it was given",
    "the digests differ: one message, and nothing is sampled from it",
)
def test_a_digest_that_differs(kind, tiny_checkpoint, capsys):
    what = {"vllm": "took other weights than it was given", "sglang": "than its peers"}[kind]
    new = weights_of(tiny_checkpoint, 1.0)
    with engine_on(kind, tiny_checkpoint, 3) as one:
        one.states[2]["says"] = "f" * 64
        with pytest.raises(MachineFault, match=rf"{one.urls[2]} .*{what}.*ffff"):
            one.engine.update_weights(new.items(), version=1)
    with engine_on(kind, tiny_checkpoint, 3, "go-on") as one:
        one.states[2]["says"] = "f" * 64
        one.engine.update_weights(new.items(), version=1)
        asked = len(one.states[2]["asked"])
        assert tokens(sample(one.engine)) == by_hand()
        assert len(one.states[2]["asked"]) == asked  # not even for a sign of life
        assert capsys.readouterr().err.count("\n") == 1


def test_a_server_with_weights_of_another_version(kind, tiny_checkpoint):
    with engine_on(kind, tiny_checkpoint) as one:
        one.states[0]["version"] = "another-7"
        with pytest.raises(UserError, match="another-7"):
            sample(one.engine)


def test_weights_that_do_not_arrive_reach_no_server(kind, tiny_checkpoint, monkeypatch):
    """The disk is full after the first file; the iterator is gone through all the same."""
    written = []

    class Full(handover.ShardWriter):
        def add(self, name, tensor):
            written.append(name)
            if len(written) > 5:
                raise OSError(28, "No space left on device")
            super().add(name, tensor)

    monkeypatch.setattr(handover, "ShardWriter", Full)
    seen = []
    new = weights_of(tiny_checkpoint, 1.0)
    with engine_on(kind, tiny_checkpoint) as one:
        with pytest.raises(MachineFault, match="No space left"):
            one.engine.update_weights(
                ((seen.append(n), (n, t))[1] for n, t in new.items()), version=1
            )
        assert len(seen) == len(new) and len(written) == 6
        assert tokens(sample(one.engine)) == by_hand()
        assert {r.weight_version for r in sample(one.engine)} == {0}


def on_a_rank(kind, model_dir, urls, transfer):
    import os

    import torch.distributed as dist

    os.environ["VLLM_API_KEY"] = os.environ["SGLANG_API_KEY"] = KEY
    dist.init_process_group("gloo")
    engine = made(kind, model_dir, urls, "go-on", transfer)
    found = [tokens(sample(engine))]
    dist.barrier()
    if dist.get_rank() == 1:  # it alone has noticed
        engine._gone[urls[0]] = f"{urls[0]} was lost"
    put = hand_over(engine, weights_of(model_dir, 1.0).items(), version=1)
    kept = {tensor.device.type for _, tensor in put.args[0]}
    thread, total = threading.Thread(target=put), torch.tensor(1)
    if dist.get_rank() == 1:
        thread.start()
    dist.all_reduce(total)  # the trainer's, before the update on one rank and after it on the other
    if dist.get_rank() == 0:
        thread.start()
    thread.join()
    found.append(tokens(sample(engine, seed=1)))
    return engine.urls, engine.weight_version, found, kept


@pytest.mark.parametrize("transfer", ["disk", "distributed"])
def test_ranks_agree_on_the_servers_that_are_left(transfer, kind, tiny_checkpoint):
    """Rank 1 begins with the second server. The weights are taken beside the trainer's collectives,
    and rank 0 alone keeps a copy of them till then."""
    stand_in, _ = STAND_INS[kind]
    states = [{}, {}]
    with ExitStack() as stack:
        urls = [
            stack.enter_context(server(stand_in(tiny_checkpoint, state)))[0] for state in states
        ]
        per_rank = run_ranks(2, on_a_rank, kind, tiny_checkpoint, urls, transfer)
    same = ([urls[1]], 1, [by_hand(), by_hand(1)])
    assert per_rank == [(*same, {"cpu"}), (*same, {"meta"})]
    assert [len(state["digests"]) for state in states] == [1, 2]


def test_urls_that_are_no_list():
    for url in ("http://a:1,,http://b:1", "http://a:1,", "http://a:1,http://a:1/"):
        with pytest.raises(UserError, match="different URLs are needed, with commas"):
            made("vllm", "nowhere", [url])
