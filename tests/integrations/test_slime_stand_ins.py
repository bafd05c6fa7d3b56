"""slime's and miles' integrations on every tested revision, on stand-ins of hooks.json's data.

What runs of the stack here is nothing; where the integration looks for what, and with which
arguments it calls it, is held to each revision. The real code: test_slime.py with a checkout.
"""

import importlib
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks
from moe_upgrpo.integrations.kit import revisions
from moe_upgrpo.integrations.slime_miles.layout import rows_of_routers
from moe_upgrpo.losses import PolicyLossConfig, policy_loss
from tests.integrations.stand_ins import installed

SLIME = ["624b824a8", "v0.3.1", "v0.3.0", "v0.2.4"]
OLDER = ["v0.3.0", "v0.2.4"]  # without prepare_routed_experts_for_routing_replay


def test_every_revision_of_hooks_json_is_run_here():
    assert set(SLIME) == set(hooks.read()["slime"])


def args_of(stack: str = "slime", **flags) -> Namespace:
    ours = f"moe_upgrpo.integrations.{stack}"
    defaults = dict(
        loss_type="custom_loss",
        custom_loss_function_path=f"{ours}.loss",
        moe_upgrpo_loss="up-grpo",
        calculate_per_token_loss=False,
        use_tis=False,
        use_rollout_logprobs=False,
        use_rollout_routing_replay=True,
        use_routing_replay=True,
        eps_clip=0.2,
        eps_clip_high=0.2,
        context_parallel_size=1,
        tensor_model_parallel_size=1,
        sequence_parallel=False,
        micro_batch_size=1,
        data_pad_size_multiplier=4,
    )
    return Namespace(**(defaults | flags))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_UPGRPO_RUN", str(tmp_path / "run"))
    return tmp_path / "run"


# --- start


@pytest.mark.parametrize("revision", SLIME)
def test_the_log_is_put_in_place_and_reports_where_the_revision_does(revision, run):
    reported = []
    bodies = {
        "log": lambda args, metrics, step_key: reported.append((metrics, step_key)),
        "compute_rollout_step": lambda args, rollout_id: 10 * rollout_id,
    }
    with installed("slime", revision, bodies) as slime:
        args = args_of()
        slime.init(args)
        import slime.backends.megatron_utils.actor as actor

        log = actor.moe_upgrpo_log
        assert (log.mode, log.path) == ("R3", run)
        log.stack.report(args, 3, {"mismatch/router_rate": 0.25})
    assert reported == [
        ({"rollout/mismatch/router_rate": 0.25, "rollout/step": 30}, "rollout/step")
    ]


@pytest.mark.parametrize("revision", SLIME)
@pytest.mark.parametrize(
    "lost",
    ["log", "compute_rollout_step", "get_batch", "forward_only", "train", "policy_loss_function",
     "compute_policy_loss", "get_routing_replay_compute_topk", "process_rollout_data",
     "get_sum_of_sample_mean"],
)  # fmt: skip
def test_a_hook_that_is_gone_is_named_at_start(revision, lost, run):
    with installed("slime", revision, without=lost) as slime:
        where = "logging_utils" if lost == "log" else "metric_utils"
        match = where if lost in ("log", "compute_rollout_step") else lost
        with pytest.raises(UserError, match=f"{match}.*(not in|has no)|has no .*{match}"):
            slime.init(args_of())


@pytest.mark.parametrize("revision", SLIME)
@pytest.mark.parametrize("lost", ["process_rollout_data", "get_data_iterator", "get_batch"])
def test_a_job_without_a_log_does_without_what_the_log_alone_needs(revision, lost, monkeypatch):
    """Its replay reports its figures all the same."""
    monkeypatch.delenv("MOE_UPGRPO_RUN", raising=False)
    with installed("slime", revision, without=lost) as slime:
        slime.init(args_of())
        import slime.backends.megatron_utils.actor as actor

        assert not hasattr(actor, "moe_upgrpo_log") and actor.train.__wrapped__


@pytest.mark.parametrize("stack", ["slime", "miles"])
def test_a_job_runs_without_the_figures_where_their_hooks_are_gone(stack, monkeypatch, capsys):
    monkeypatch.delenv("MOE_UPGRPO_RUN", raising=False)
    monkeypatch.setattr(revisions, "_said", set())
    revision = {"slime": SLIME[0], "miles": "31f1ca961"}[stack]
    every = hooks.read()[stack][revision]
    found = {hook: about for hook, about in every.items() if not hook.endswith(":train")}
    here = revisions.Installed(stack, Path("/x"), "0" * 40, None, found)
    managers = Manager("routing", ""), Manager("indexer", "")
    opened = {
        "slime": lambda: installed("slime", revision, without="train"),
        "miles": lambda: installed_miles(revision, *managers, without="train"),
    }
    with opened[stack]() as ours:
        monkeypatch.setattr(revisions, "installed", lambda _: here)
        ours.init(args_of(stack))
        actor = importlib.import_module(f"{stack}.backends.megatron_utils.actor")
        assert not hasattr(actor, "moe_upgrpo_health")
        said = capsys.readouterr().out
        assert f"health is left out: {stack} 000000000 lacks {stack}/backends/" in said
        monkeypatch.setenv("MOE_UPGRPO_RUN", "run")
        with pytest.raises(UserError, match="lacks what the routing log of moe_upgrpo needs"):
            ours.init(args_of(stack))


@pytest.mark.parametrize("revision", SLIME)
def test_what_a_release_cannot_do_is_said_at_start(revision, run):
    two = {"context_parallel_size": 2}
    observe = {"moe_upgrpo_replay": "observe"}

    def init(**flags):
        with installed("slime", revision) as slime:
            slime.init(args_of(**flags))

    init(**two)
    init(**two, **observe, allgather_cp=True)
    init(allgather_cp=True)  # one rank has the whole
    if revision in OLDER:
        with pytest.raises(
            UserError, match="does not cover R3 with --allgather-cp in this release"
        ):
            init(**two, allgather_cp=True)
    else:
        init(**two, allgather_cp=True)
    init(**observe, qkv_format="bshd")
    with pytest.raises(UserError, match="does not cover R3 with --qkv-format bshd"):
        init(qkv_format="bshd")
    with pytest.raises(UserError, match="--qkv-format: bshd given with --context-parallel-size 2"):
        init(**two, **observe, qkv_format="bshd")


# --- the loss


def log_probs_of(logits, args, unconcat_tokens, response_lengths, **_):
    rows = logits[0].log_softmax(-1).split([len(t) for t in unconcat_tokens])
    found = [
        row[-r - 1 : -1].gather(1, tokens[-r:, None])[:, 0]
        for row, tokens, r in zip(rows, unconcat_tokens, response_lengths, strict=True)
    ]
    return torch.empty(0), {"log_probs": found, "entropy": [torch.zeros_like(x) for x in found]}


def sum_of_sample_mean(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False,
                       sample_denoms=None, **_):  # fmt: skip
    sizes = sample_denoms
    if sizes is None:
        sizes = [mask.sum() for mask in loss_masks]
    if calculate_per_token_loss:
        sizes = [1] * len(loss_masks)
    return lambda x: sum(
        (part * mask).sum() / size
        for part, mask, size in zip(x.split(response_lengths), loss_masks, sizes, strict=True)
    )


BATCH = {
    "unconcat_tokens": [torch.tensor([1, 2, 3, 4]), torch.tensor([3, 0, 1])],
    "total_lengths": [4, 3],
    "response_lengths": [2, 2],
    "loss_masks": [torch.tensor([1, 1]), torch.tensor([1, 0])],
    "advantages": [torch.full((2,), 1.0), torch.full((2,), -1.0)],
}


@pytest.mark.parametrize("revision", SLIME)
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_loss_in_the_place_of_the_revisions_own(revision, aggregation):
    logits = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    args = args_of(moe_upgrpo_settings={"aggregation": aggregation})
    args.custom_pg_loss_reducer_function_path = None
    current = log_probs_of(logits, args, BATCH["unconcat_tokens"], [2, 2])[1]["log_probs"]
    batch = BATCH | {"log_probs": [x.detach() + 0.1 for x in current]}

    def body(args, batch, logits, sum_of_sample_mean):
        """The part that every revision's policy_loss_function does, with its own functions."""
        import slime.backends.megatron_utils.cp_utils as cp_utils
        import slime.backends.megatron_utils.loss as module

        _, found = module.get_log_probs_and_entropy(
            logits, args=args, unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"],
            with_entropy=True,
        )  # fmt: skip
        kl = torch.cat(batch["log_probs"]) - torch.cat(found["log_probs"])
        clips = args.eps_clip, args.eps_clip_high
        per_token, clipped = module.compute_policy_loss(kl, torch.cat(batch["advantages"]), *clips)
        reducer = sum_of_sample_mean
        if path := args.custom_pg_loss_reducer_function_path:
            reducer = getattr(ours, path.rsplit(".", 1)[1])(
                batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], False
            )
            assert cp_utils.get_sum_of_sample_mean is not None
        return reducer(per_token), {"pg_clipfrac": sum_of_sample_mean(clipped)}

    bodies = {
        "policy_loss_function": body,
        "get_log_probs_and_entropy": log_probs_of,
        "all_gather_with_cp": lambda tensor, **_: tensor,
        "slice_log_prob_with_cp": lambda log_prob, **_: log_prob,
        "get_sum_of_sample_mean": sum_of_sample_mean,
    }
    with installed("slime", revision, bodies) as ours:
        stacks = sum_of_sample_mean([4, 3], [2, 2], BATCH["loss_masks"])
        loss, metrics = ours.loss(args, batch, logits, stacks)
    pad = torch.nn.utils.rnn.pad_sequence
    expected = policy_loss(
        *(pad(batch_of, batch_first=True) for batch_of in (
            current, batch["log_probs"], batch["advantages"], batch["loss_masks"])),
        config=PolicyLossConfig.preset("up-grpo", aggregation=aggregation),
        global_sequences=1,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5) and loss.item() != 0
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.loss, logits)
    torch.testing.assert_close(grad, wanted)
    # Of the two sums, that of the tokens with a positive advantage: both of the first sequence.
    assert metrics["positive_fraction_numerator"] == 2


@pytest.mark.parametrize(
    ("revision", "name"),
    [("624b824a8", "rollout_mask_sums"), ("v0.3.1", "rollout_mask_sums"),
     ("v0.3.0", "group_mask_sums"), ("v0.2.4", None)],
)  # fmt: skip
def test_the_second_look_divides_by_what_the_revision_does(revision, name, run):
    """Each of two samples of one rollout by the tokens of both; v0.2.4 each by its own."""
    sums = {name: torch.tensor([3.0, 3.0])} if name else {}
    with installed("slime", revision, {"get_sum_of_sample_mean": sum_of_sample_mean}) as slime:
        stack = slime.Slime()
        loss, reducer = stack.loss_of(args_of(loss_type="policy_loss"), BATCH | sums)
        assert loss is stack.losses.policy_loss_function
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert reducer(values).item() == pytest.approx(7 / 3 if name else 3 / 2 + 4)


# --- the log


@pytest.mark.parametrize("revision", SLIME)
def test_the_logs_own_forward_is_one_that_the_revision_takes(revision, run):
    took = []
    bodies = {
        "forward_only": lambda **given: took.append(given),
        "RoutingReplay.clear_all_forward": lambda: took.append("rewound"),
    }
    with installed("slime", revision, bodies) as slime:
        stack = slime.Slime()
        os.environ.pop("ROUTING_REPLAY_STAGE", None)
        with stack.extra_forward("fallthrough"):
            assert os.environ["ROUTING_REPLAY_STAGE"] == "fallthrough"
            stack.model.forward_only(1, 2, 3, 4, 5, **stack.forward_arguments(0))
        assert "ROUTING_REPLAY_STAGE" not in os.environ
    given, rewound = took
    assert rewound == "rewound"
    top_p = "use_rollout_top_p_replay"
    assert given.get(top_p) is (True if revision in ("624b824a8", "v0.3.1") else None)


@pytest.mark.parametrize("revision", SLIME)
def test_what_a_router_would_have_chosen(revision, run):
    """slime's replay asks get_routing_replay_compute_topk at each call."""
    replayed = torch.tensor([[3, 2]])
    bodies = {
        "get_routing_replay_compute_topk": lambda old_compute_topk: lambda *a, **k: (None, replayed)
    }

    def topk(scores, k, num_groups=None, group_topk=None):
        return scores.topk(k, dim=1)

    with installed("slime", revision, bodies) as slime:
        seen = []
        with slime.Slime().watched(seen.append):
            compute = slime.routing_replay.get_routing_replay_compute_topk(topk)
            assert compute(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)[1] is replayed
    assert seen[0].tolist() == [[1, 3]]


@pytest.mark.parametrize("revision", SLIME)
def test_rewards_are_of_this_ranks_sequences(revision, run):
    """raw_reward has those of the whole batch; the shard's partition says which are whose."""

    def process(args, rollout_data_ref, dp_rank, dp_size):
        import slime.utils.data as data

        shard = dict(data.ray.get(rollout_data_ref[dp_rank].inner))
        shard.pop("partition")
        return shard

    shard = {"partition": [1, 3], "raw_reward": [0.0, 0.25, 0.5, 0.75], "tokens": [1, 2]}
    with installed("slime", revision, {"process_rollout_data": process}) as slime:
        stack = slime.Slime()
        stack.prepare()
        ref = [None, SimpleNamespace(inner=shard | {"rewards": [9, 9]})]
        data = stack.actor.process_rollout_data(None, ref, 1, 2)
        assert "partition" not in data
        assert stack.rewards(data) == [0.25, 0.75]
        assert stack.rewards({"rewards": [1.0], "tokens": [1]}) == [1.0]


# --- the layout


def get_batch(data_iterator, keys, pad_multiplier, qkv_format="thd", allgather_cp=False):
    """Written for this test, as slime v0.3.0 has it: one context-parallel rank."""
    batch = data_iterator.get_next(keys)
    tokens = batch["tokens"]
    if qkv_format == "bshd":
        length = batch["max_seq_lens"][0]
        rows = [torch.nn.functional.pad(t, (0, length - len(t))) for t in tokens]
        return {"tokens": torch.stack(rows)}
    tokens = torch.cat(tokens)
    pad = -len(tokens) % pad_multiplier
    return {"tokens": torch.nn.functional.pad(tokens, (0, pad))[None]}


class DataIterator:
    def __init__(self, rollout_data, micro_batch_indices):
        self.rollout_data, self.micro_batch_indices = rollout_data, micro_batch_indices
        self.offset = 1  # wherever it stands

    def reset(self):
        self.offset = 0
        return self

    def get_next(self, keys):
        at = self.micro_batch_indices[self.offset]
        self.offset += 1
        return {k: v and [v[i] for i in at] for k in keys for v in [self.rollout_data.get(k)]}


def test_which_row_each_row_of_a_router_is():
    """By hand. Sequences of 3, 2 and 4 tokens have rows 0 1, 2 and 3 4 5; the last has none."""
    data = {"tokens": [torch.tensor(x) for x in ([7, 7, 7], [7, 7], [7, 7, 7, 7])]}
    iterator = DataIterator(data | {"max_seq_lens": [4, 4, 4]}, [[2, 0], [1]])

    def rows(**flags):
        rank = flags.pop("rank", 0)
        found = rows_of_routers(get_batch, args_of(**flags), [iterator], [1, 1], tensor_rank=rank)
        return [x.tolist() for x in found]

    assert rows() == [[3, 4, 5, -1, 0, 1, -1, -1], [2, -1, -1, -1]]
    two = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert rows(**two, rank=1) == [[0, 1, -1, -1], [-1, -1]]
    # Megatron has position 0 of both sequences, then position 1 of both.
    assert rows(qkv_format="bshd") == [[3, 0, 4, 1, 5, -1, -1, -1], [2, -1, -1, -1]]
    assert iterator.offset == 1 and np.all(iterator.rollout_data["tokens"][0].numpy() == 7)


# --- miles' indexer


class Manager:
    """The part of miles' replay_base that extra forwards touch."""

    enable_check_replay_result = False

    def __init__(self, name, stage):
        self.name, self.stage, self.rewound = name, stage, 0

    def clear_all_forward(self):
        self.rewound += 1

    def check_replay_result(self, *_):
        raise AssertionError

    def get_topk_fn(self, old_topk_fn, return_probs):
        raise AssertionError


@pytest.mark.parametrize(
    ("flags", "at_work"),
    [
        ({}, "fallthrough"),
        # What it records in the stack's own forward it does not record twice.
        ({"use_indexer_replay": True}, "fallthrough"),
        # The rollout's are replayed in every forward, so that only the routes differ.
        ({"use_indexer_replay": True, "use_rollout_indexer_replay": True}, "replay_forward"),
    ],
)
@pytest.mark.parametrize("stage", ["record", "replay_backward"])
def test_miles_indexer_replay_is_left_alone(flags, at_work, stage, run):
    routing, indexer = Manager("routing", stage), Manager("indexer", stage)
    for revision in ("31f1ca961", "v0.1.0"):
        with installed_miles(revision, routing, indexer) as miles:
            stack = miles.Miles(args_of("miles", **flags))
            before = indexer.rewound
            with stack.extra_forward("fallthrough"):
                assert (routing.stage, indexer.stage) == ("fallthrough", at_work)
            with stack.extra_forward("replay_forward"):
                assert (routing.stage, indexer.stage) == ("replay_forward", at_work)
            assert (routing.stage, indexer.stage) == (stage, stage)
            assert indexer.rewound == before + 2


def installed_miles(revision: str, routing: Manager, indexer: Manager, without: str = ""):
    managers = {"all_replay_managers": [routing, indexer], "routing_replay_manager": routing}
    return installed("miles", revision, without=without, replay_base=managers)


TWO = {"qkv_format": "bshd", "micro_batch_size": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (TWO, "R3 with --qkv-format bshd and --micro-batch-size 2"),
        (
            TWO | {"allgather_cp": True, "context_parallel_size": 2},
            "--micro-batch-size: 2 given with --qkv-format bshd and --allgather-cp; allowed .*: 1",
        ),
        ({"multi_lora": True}, "does not cover multi-LoRA"),
    ],
)
def test_what_miles_cannot_do_is_said_at_start(flags, message, run):
    managers = Manager("routing", ""), Manager("indexer", "")
    with (
        installed_miles("v0.1.0", *managers) as miles,
        pytest.raises(UserError, match=message),
    ):
        miles.init(args_of("miles", **flags))


@pytest.mark.parametrize("flags", [
    {"qkv_format": "bshd"},
    {"qkv_format": "bshd", "micro_batch_size": 2, "moe_upgrpo_replay": "observe"},
    {"qkv_format": "bshd", "context_parallel_size": 2},
    {"context_parallel_size": 2, "allgather_cp": True, "micro_batch_size": 2},
    {"use_indexer_replay": True, "use_rollout_indexer_replay": True},
])  # fmt: skip
def test_what_miles_logs(flags, run):
    with installed_miles("v0.1.0", Manager("routing", ""), Manager("indexer", "")) as miles:
        miles.init(args_of("miles", **flags))
        import miles.backends.megatron_utils.actor as actor

        assert actor.moe_upgrpo_log.path == run
