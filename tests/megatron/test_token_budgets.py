"""Budgets of tokens compute what fixed micro-batches do, and hand it back in the order given.

Against micro-batches of 3 of one process without a budget: scores, what an update saw, gradient and
metrics, with routes to replay and a loss that draws for its tokens and looks at the whole
mini-batch. TOLERANCE as between layouts. The long sequences are all given to the first rank, so
that ranks have to exchange them.
"""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig, merge_metrics
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.tap import RECORDS
from moe_upgrpo.train.analysis import trainer_noise_floor
from tests.megatron.compare import assert_close, in_order
from tests.megatron.measured import ADAM_AS_SGD, NO_STEP, gradients_by_name, make_samples
from tests.ranks import run_ranks

LOSSES = ("up-grpo", "clip-cov")
BUDGET = 28  # the longest has 14 tokens
FIELDS = ("log_probs", "entropy", "routes", "own_routes", "margins", "gates")
LAYOUTS = {
    "DP2": ("tiny", 2, Layout()),
    "EP2": ("tiny", 2, Layout(ep=2)),
    "TP2·EP2·DP2": ("tiny", 4, Layout(tp=2, ep=2)),
    "EP2 allgather": ("tiny", 2, Layout(ep=2, dispatcher="allgather")),
    "PP2": ("mixed", 2, Layout(pp=2)),
    "PP2·VPP2": ("mixed", 2, Layout(pp=2, vpp=2)),
    "EP2·PP2": ("mixed", 4, Layout(ep=2, pp=2)),
}
MAIN = ("EP2",)  # processor time; the others are the same kind


def long_ones_first() -> list:
    """The longer half, then the shorter, either in rising order."""
    made = sorted(make_samples(), key=lambda sample: len(sample.tokens))
    return [replace(sample, number=i) for i, sample in enumerate(made[4:] + made[:4])]


def held(samples, scored, experts: int):
    """Every other one with routes to replay: expert sets that no router would choose."""
    return [
        replace(s, routes=(one.routes + 3) % experts) if i % 2 else s
        for i, (s, one) in enumerate(zip(samples, scored, strict=True))
    ]


def measure(layout: Layout, checkpoint, **limit) -> dict:
    """On a rank: scores, updates, gradients; which sequences it computed."""
    with groups.process_groups(layout):
        dp_rank, dp_size = groups.data_parallel()
        share = len(make_samples()) // dp_size
        mine = long_ones_first()[dp_rank * share : (dp_rank + 1) * share]
        actor = MegatronActor(checkpoint, layout, optimizer=NO_STEP, **limit)
        native = actor.score(mine, record=RECORDS)
        found = {"dp_rank": dp_rank, "scored": {"native": native}, "update": {}, "gradient": {}}
        batch = held(mine, native, actor.num_experts)
        found["scored"]["held"] = actor.score(batch, record=RECORDS)
        found["again"] = actor.score(mine, record=RECORDS)
        own = [
            replace(sample, routes=one.routes[:, :, ::-1])
            for sample, one in zip(mine, native, strict=True)
        ]
        found["own"] = actor.score(own, record=RECORDS)
        for loss in LOSSES:
            found["update"][loss] = actor.update(
                batch, PolicyLossConfig.preset(loss), record=RECORDS, seed=5
            )
            found["gradient"][loss] = gradients_by_name(actor)
        work = actor._work(mine, actor.limit)
        found["computed"] = [sample.number for sample in work.samples]
        found["shapes"] = [tuple(inputs.tokens_BS.shape) for inputs in work.inputs]
        trained = MegatronActor(checkpoint, layout, optimizer=ADAM_AS_SGD, **limit)
        trained.update(batch, PolicyLossConfig.preset("up-grpo"))
        found["step"] = {name: tensor.clone() for name, tensor in trained.export_weights()}
        if groups.world_size() == 1:
            with mock.patch.object(actor, "score", wraps=actor.score) as score:
                found["noise"] = trainer_noise_floor(actor, mine).sums
            found["sizes"] = [call.kwargs.get("micro_batch_size") for call in score.mock_calls]
        return found


def assert_own_routes_change_no_bit(ranks: list[dict]) -> None:
    """Replayed, with the ids of each row in another order."""
    for rank in ranks:
        for a, b in zip(rank["own"], rank["scored"]["native"], strict=True):
            assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def copies(ranks: list[dict]) -> list[dict]:
    """One rank of each copy of the model."""
    return [*{rank["dp_rank"]: rank for rank in ranks}.values()]


def assert_equals(ranks: list[dict], expected: dict) -> None:
    for kind, of_one in expected["scored"].items():
        found = in_order(ranks, lambda rank, k=kind: rank["scored"][k])
        for a, e in zip(found, of_one, strict=True):
            for field in FIELDS:
                assert getattr(a, field).shape == getattr(e, field).shape
                np.testing.assert_allclose(getattr(a, field), getattr(e, field), rtol=0, atol=1e-5)
    for loss, update in expected["update"].items():
        for field in ("log_probs", "clipped", "gradient_weight"):
            found = in_order(ranks, lambda rank, x=loss, f=field: getattr(rank["update"][x], f))
            for a, e in zip(found, getattr(update, field), strict=True):
                assert a.dtype == e.dtype
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
        for a, e in zip(
            in_order(ranks, lambda rank, x=loss: rank["update"][x].scored),
            update.scored,
            strict=True,
        ):
            assert np.array_equal(a.routes, e.routes)
        of_copies = [rank["update"][loss] for rank in copies(ranks)]
        assert sum(one.loss for one in of_copies) == pytest.approx(update.loss, rel=1e-4, abs=1e-5)
        metrics = merge_metrics([one.metrics for one in of_copies])
        assert metrics.keys() == update.metrics.keys()
        for name, metric in update.metrics.items():
            assert metrics[name] == pytest.approx(metric, rel=1e-4, abs=1e-5), name
        for rank in ranks:
            assert_close(rank["gradient"][loss], expected["gradient"][loss])
    for rank in ranks:
        assert_close(rank["step"], expected["step"])


@pytest.fixture(scope="module")
def fixed(checkpoints):
    """By the checkpoint: one process, micro-batches of 3 in the order given."""
    made = {}

    def of(name: str) -> dict:
        if name not in made:
            made[name] = measure(Layout(), checkpoints[name], micro_batch_size=3)
        return made[name]

    return of


@pytest.fixture(scope="module")
def budgeted(checkpoints):
    return measure(Layout(), checkpoints["tiny"], micro_batch_tokens=BUDGET)


def test_one_process_sorts_and_hands_back_in_the_order_given(budgeted, fixed):
    found, expected = budgeted, fixed("tiny")
    assert_equals([found], expected)
    assert expected["computed"] == [*range(8)]
    assert sorted(found["computed"]) == [*range(8)] != found["computed"]
    assert found["shapes"] != expected["shapes"]
    assert all(rows * length <= BUDGET for rows, length in found["shapes"])
    # Padded to its own longest, each: fewer rows than micro-batches of 3 have.
    real = sum(len(sample.tokens) for sample in make_samples())
    padded = [sum(b * s for b, s in one["shapes"]) for one in (found, expected)]
    assert real <= padded[0] < padded[1]


@pytest.mark.parametrize(
    "name", [n if n in MAIN else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_ranks_share_the_work_and_equal_one_process(name, checkpoints, fixed):
    checkpoint, world_size, layout = LAYOUTS[name]
    ranks = run_ranks(
        world_size, measure_with_budget, layout, checkpoints[checkpoint], timeout_s=240
    )
    assert_equals(ranks, fixed(checkpoint))
    of_copies = copies(ranks)
    assert sorted(n for rank in of_copies for n in rank["computed"]) == [*range(8)]
    assert len({len(rank["shapes"]) for rank in ranks}) == 1
    for rank in ranks:
        assert all(rows * length <= BUDGET for rows, length in rank["shapes"])
        if layout.vpp > 1:
            assert len(rank["shapes"]) % layout.pp == 0
    if len(of_copies) > 1:
        assert sorted(of_copies[0]["computed"]) != [*range(8 // len(of_copies))]


def measure_with_budget(layout: Layout, checkpoint) -> dict:
    return measure(layout, checkpoint, micro_batch_tokens=BUDGET)


@pytest.mark.bits
def test_the_same_sequences_give_the_same_bits_again_and_another_shape_is_tried(budgeted):
    """The noise floor's repeated pass is the same, and its other batch shape another one."""
    for a, b in zip(budgeted["again"], budgeted["scored"]["native"], strict=True):
        assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)
    noise = budgeted["noise"]
    assert noise["noise/trainer_repeat/logp_mean_abs"].numerator == 0
    assert noise["noise/trainer_batch_shape/logp_mean_abs"].numerator < 1e-3
    assert budgeted["sizes"] == [None, 1, None]  # the longest twice are a budget


def cut_to_three(sample: Sample) -> Sample:
    """Two tokens of the prompt and the response's first."""
    return replace(
        sample,
        tokens=sample.tokens[:3],
        prompt_length=2,
        old_log_probs=sample.old_log_probs[:1],
        rollout_log_probs=sample.rollout_log_probs[:1],
    )


def one_long_among_short(layout: Layout, checkpoint, **limit) -> dict:
    """On a rank: an update of four sequences, of which all but one are short."""
    with groups.process_groups(layout):
        dp_rank, dp_size = groups.data_parallel()
        made = sorted(make_samples(), key=lambda sample: -len(sample.tokens))
        mine = [made[0], *map(cut_to_three, made[1:4])][dp_rank::dp_size]
        actor = MegatronActor(checkpoint, layout, optimizer=NO_STEP, **limit)
        work = actor._work(mine, actor.limit)
        update = actor.update(mine, PolicyLossConfig.preset("up-grpo"), record=RECORDS)
        return {"computed": len(work.samples), "update": update} | {
            "gradient": gradients_by_name(actor)
        }


def few_with_budget(layout: Layout, checkpoint) -> dict:
    return one_long_among_short(layout, checkpoint, micro_batch_tokens=BUDGET)


@pytest.mark.slow
def test_a_rank_that_is_left_without_sequences_joins_in(checkpoints):
    """Three of 3 tokens together cost less than one of 13: two of the four ranks have none."""
    expected = one_long_among_short(Layout(), checkpoints["tiny"], micro_batch_size=1)
    ranks = run_ranks(4, few_with_budget, Layout(ep=2), checkpoints["tiny"], timeout_s=240)
    assert sorted(rank["computed"] for rank in ranks) == [0, 0, 1, 3]
    for rank, log_probs in zip(ranks, expected["update"].log_probs, strict=True):
        (own,) = rank["update"].log_probs
        np.testing.assert_allclose(own, log_probs, rtol=1e-4, atol=1e-5)
        assert len(rank["update"].scored) == 1
        assert_close(rank["gradient"], expected["gradient"])
        assert rank["update"].metrics.keys() == expected["update"].metrics.keys()


def exchanged_and_over_budget(checkpoint) -> tuple[list, str]:
    with groups.process_groups(Layout()):
        dp_rank, size = groups.data_parallel()
        parts = [[(dp_rank, to)] * (dp_rank + to) for to in range(size)]
        exchanged = groups.exchange_over_data_parallel(parts)
        mine = long_ones_first()[dp_rank::2]
        if dp_rank:
            mine = mine[-1:]
        longest = max(len(sample.tokens) for sample in long_ones_first())
        actor = MegatronActor(checkpoint, Layout(), micro_batch_tokens=longest - 1)
        with pytest.raises(UserError, match=f"--micro-batch-tokens {longest} or more"):
            actor.check_length(longest)
        try:
            actor.score(mine)
        except UserError as error:
            return exchanged, str(error)
        return exchanged, "none"


def test_lists_of_any_length_are_exchanged_and_a_budget_too_small_is_said_on_every_rank(
    checkpoints,
):
    """Rank r has r + t objects for rank t, none among them; one rank alone has a long sequence."""
    found = run_ranks(2, exchanged_and_over_budget, checkpoints["tiny"])
    for rank, (got, _) in enumerate(found):
        assert got == [[(sender, rank)] * (sender + rank) for sender in range(2)]
    assert found[0][1] == found[1][1] and "--micro-batch-tokens" in found[0][1]
