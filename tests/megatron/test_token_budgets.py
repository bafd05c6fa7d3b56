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
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import balance, groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.tap import RECORDS
from tests.megatron.compare import assert_close
from tests.megatron.measured import NO_STEP, gradients_by_name, make_samples
from tests.megatron.whole_work import (
    FIELDS,
    assert_equals,
    copies,
    long_ones_first,
    measure,
)
from tests.ranks import run_ranks

BUDGET = 28  # the longest has 14 tokens
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
def test_by_default_sequences_that_gain_little_stay_and_keep_every_bit(checkpoints):
    """Two micro-batches of four, by count, and in a budget of four of the longest."""
    found = []
    with groups.process_groups(Layout()):
        for limit in ({}, {"longest": 14}):
            actor = MegatronActor(
                checkpoints["tiny"], Layout(), optimizer=NO_STEP, micro_batch_size=4, **limit
            )
            update = actor.update(make_samples(), PolicyLossConfig.preset("up-grpo"))
            found.append((update.log_probs, gradients_by_name(actor)))
    (log_probs, gradients), (of_default, gradients_of_default) = found
    for a, b in zip(log_probs, of_default, strict=True):
        assert np.array_equal(a, b)
    for name, gradient in gradients.items():
        assert np.array_equal(gradients_of_default[name], gradient)


def measure_default(layout: Layout, checkpoint) -> dict:
    with mock.patch.object(balance, "_START", 0):  # as if these few tokens were many
        return measure(layout, checkpoint, micro_batch_size=3, longest=14)


def test_by_default_sequences_that_gain_much_are_sorted(checkpoints, fixed):
    found, expected = measure_default(Layout(), checkpoints["tiny"]), fixed("tiny")
    assert_equals([found], expected)
    assert sorted(found["computed"]) == [*range(8)] != found["computed"]
    assert all(rows * length <= 3 * 14 for rows, length in found["shapes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_by_default_ranks_share_what_gains_much(name, checkpoints, fixed):
    checkpoint, world_size, layout = LAYOUTS[name]
    ranks = run_ranks(world_size, measure_default, layout, checkpoints[checkpoint], timeout_s=240)
    assert_equals(ranks, fixed(checkpoint))
    of_copies = copies(ranks)
    assert sorted(n for rank in of_copies for n in rank["computed"]) == [*range(8)]
    one_shape = layout.dispatcher == "allgather" or layout.vpp > 1
    if len(of_copies) > 1:
        mine = sorted(of_copies[0]["computed"])
        assert (mine == [*range(8 // len(of_copies))]) == one_shape


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
