"""Shares of sequences by length: each once, within the budget, the ranks alike, whatever they are.

The simulation stands in benchmarks/micro/balance.py; what the actor computes of the shares is held
by test_token_budgets.py.
"""

import numpy as np
import pytest

from benchmarks.micro import balance
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.balance import (
    Cost,
    Limit,
    counted,
    equal_shares,
    packed_shares,
    saves,
    shares,
    useful_share,
)

BY_LENGTH = Cost()
BY_PAIRS = Cost(linear=0, quadratic=1)


def drawn(seed: int) -> tuple[list[int], dict]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 200, size=int(rng.integers(1, 60))).tolist()
    multiple_of = int(rng.choice([1, 2, 32]))
    longest = -(-max(lengths) // multiple_of) * multiple_of
    tokens = int(longest * rng.choice([1, 1.3, 4, 100]))
    return lengths, dict(ranks=int(rng.integers(1, 9)), tokens=tokens, multiple_of=multiple_of)


def test_each_sequence_is_once_in_a_micro_batch_within_the_budget():
    for seed in range(60):
        assert_shares_are_whole(seed)


def assert_shares_are_whole(seed: int) -> None:
    lengths, given = drawn(seed)
    cost = Cost(linear=1, quadratic=seed / 500)
    dealt = shares(lengths, **given, cost=cost)
    same, shape = equal_shares(lengths, **given)
    for of_ranks in (dealt, same):
        assert len(of_ranks) == given["ranks"]
        assert sorted(i for share in of_ranks for b in share for i in b) == [*range(len(lengths))]
        for batch in (b for share in of_ranks for b in share):
            longest = -(-max(lengths[i] for i in batch) // given["multiple_of"])
            assert batch and len(batch) * longest * given["multiple_of"] <= given["tokens"]
    assert all(len(batch) <= shape[0] for share in same for batch in share)
    assert shape[0] * shape[1] <= given["tokens"] and shape[1] % given["multiple_of"] == 0
    sizes = [sum(map(len, share)) for share in same]
    assert max(sizes) - min(sizes) <= 1
    # Every rank computes the same, and lists of the same lengths have the same shares.
    assert dealt == shares([*lengths], **given, cost=cost)


def test_packed_each_sequence_is_once_in_a_micro_batch_within_the_budget():
    for seed in range(60):
        lengths, given = drawn(seed)
        dealt = packed_shares(lengths, **given, cost=Cost(linear=1, quadratic=seed / 500))
        assert len(dealt) == given["ranks"]
        assert sorted(i for share in dealt for b in share for i in b) == [*range(len(lengths))]
        for batch in (b for share in dealt for b in share):
            real = sum(lengths[i] for i in batch)
            assert (
                batch and -(-real // given["multiple_of"]) * given["multiple_of"] <= given["tokens"]
            )


def test_packed_shares_worked_by_hand():
    """Budget 8, 23 tokens, three micro-batches: the 8 alone, and 4 + 2 + 2, 4 + 2 + 1."""
    lengths = [2, 4, 8, 2, 1, 4, 2]
    (one,) = packed_shares(lengths, ranks=1, tokens=8, cost=BY_LENGTH)
    assert one == [[2], [1, 0, 6], [5, 3, 4]]
    # Two ranks have two each: 8, 4 + 2, 4 + 1 and 2 + 2, of which one gets 12 and the other 11.
    two = packed_shares(lengths, ranks=2, tokens=8, cost=BY_LENGTH)
    assert two == [[[2], [0, 3]], [[1, 6], [5, 4]]]
    # Sharded by 4, a budget of 7 is one of 4.
    assert packed_shares([3, 2], ranks=1, tokens=7, multiple_of=4, cost=BY_LENGTH) == [[[0], [1]]]
    # Even in pairs of tokens, where a budget alone would put the long ones together.
    (even,) = packed_shares([5, 5, 1, 1, 1, 1, 1, 1], ranks=1, tokens=10, cost=BY_PAIRS)
    assert even == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_shares_worked_by_hand():
    """Budget 8: the 8 alone, 4 and 4, then 2, 2, 2 and 1; three pieces would leave a rank idle."""
    lengths = [2, 4, 8, 2, 1, 4, 2]
    assert shares(lengths, ranks=1, tokens=8, cost=BY_LENGTH) == [[[2], [1, 5], [0, 3, 6, 4]]]
    # Costs 8, 8 and 8 in tokens: two ranks take four pieces of which none costs more than 8.
    two = shares(lengths, ranks=2, tokens=8, cost=BY_LENGTH)
    assert sorted(map(len, two)) == [1, 2]
    # In pairs of tokens: 64 | 32 and 13: the rank of the long one gets nothing else.
    assert [[2]] in shares(lengths, ranks=2, tokens=8, cost=BY_PAIRS)


def test_the_costliest_come_first_and_a_rank_without_work_has_none():
    dealt = shares([5, 9, 3], ranks=4, tokens=100, cost=BY_LENGTH)
    assert sorted(dealt) == [[], [[0]], [[1]], [[2]]]
    (one,) = shares([1] * 4 + [64] * 2, ranks=1, tokens=64, cost=BY_LENGTH)
    assert [len(batch) for batch in one] == [1, 1, 4]


def test_more_micro_batches_are_made_where_they_save_padding():
    """One of 16 rows x 64 would do; two or three are nearly without padding."""
    lengths = [64] * 2 + [4] * 14
    (one,) = shares(lengths, ranks=1, tokens=2048, cost=BY_LENGTH)
    assert [len(batch) for batch in one] == [2, 14]
    (same,) = shares([64] * 16, ranks=1, tokens=2048, cost=BY_LENGTH)
    assert len(same) == 1


def test_one_shape_for_all_is_the_longest_and_no_emptier_than_it_must_be():
    dealt, shape = equal_shares([3, 9, 5, 7, 2], ranks=1, tokens=40, multiple_of=2)
    assert shape == (3, 10) and [len(batch) for batch in dealt[0]] == [3, 2]
    dealt, shape = equal_shares([3, 9, 5, 7, 2], ranks=2, tokens=40)
    assert shape == (3, 9) and dealt == [[[1, 2, 4]], [[3, 0]]]


def test_a_micro_batch_more_has_to_save_the_work_of_512_tokens():
    """14 of 4 beside two of a length l: two micro-batches save 14·(l − 4) of 16·l tokens."""
    for longest, count in ((40, 1), (41, 2)):  # 504 and 518
        (one,) = shares([longest] * 2 + [4] * 14, ranks=1, tokens=2048, cost=BY_LENGTH)
        assert len(one) == count


def test_counted_shares_are_the_sequences_in_their_order():
    assert counted([3, 0, 2], 2) == [[[0, 1], [2]], [], [[3, 4]]]
    assert counted([4], 128) == [[[0, 1, 2, 3]]]


def test_sequences_move_where_that_saves_enough_and_otherwise_stay():
    """Two ranks of two: 4,000 tokens beside 1,000 each is 5,000, or 8,000 and 2,000 unmoved."""
    kept = [[[0], [1]], [[2], [3]]]
    moved = [[[0], [2]], [[1], [3]]]
    assert saves([4000, 4000, 1000, 1000], moved, kept, BY_LENGTH)
    # Worth 512 tokens, and of longer ones 2% of the busiest rank's work, here about 3,300.
    for longer, worth in ((1512, False), (1514, True)):
        lengths = [longer, longer, 1000, 1000]  # moving saves longer − 1,000
        assert saves(lengths, moved, kept, BY_LENGTH) == worth
    for longer, worth in ((80_000, False), (80_500, False), (84_000, True)):
        lengths = [longer, longer, 80_000, 80_000]
        assert saves(lengths, moved, kept, BY_LENGTH) == worth
    # Another order alone saves nothing, padded or packed.
    lengths = [64, 30] * 20
    together, sorted_ = [[[*range(40)]]], [[[*range(0, 40, 2), *range(1, 40, 2)]]]
    assert not saves(lengths, sorted_, together, BY_LENGTH, multiple_of=64)
    assert not saves(lengths, sorted_, together, BY_LENGTH, packed=True)


def test_the_run_of_make_train_stays_in_its_order():
    """256 sequences of 9 or 10 tokens on one rank: sorted they would save 5%, of few tokens."""
    lengths = [9, 10] * 128
    moved = shares(lengths, ranks=1, tokens=Limit(sequences=128, longest=10).budget(1), cost=Cost())
    assert not saves(lengths, moved, counted([256], 128), BY_LENGTH)
    longer = [100 * length for length in lengths]
    moved = shares(longer, ranks=1, tokens=128_000, cost=BY_LENGTH)
    assert saves(longer, moved, counted([256], 128), BY_LENGTH)


def test_useful_share_by_hand():
    """Rank 0 pays 2 rows of 4, rank 1 one of 2: 4 + 3 + 2 tokens of 2 ranks x 8."""
    assert useful_share([4, 3, 2], [[[0, 1]], [[2]]], BY_LENGTH) == 9 / 16
    assert useful_share([4, 3, 2], [[[0, 1]], [[2]]], BY_PAIRS) == 29 / 64
    assert useful_share([4, 3, 2], [[[0, 1]], [[2]]], BY_LENGTH, packed=True) == 9 / 14


def test_the_cost_is_of_tokens_and_of_pairs_of_tokens():
    assert Cost(linear=3, quadratic=0.5)(4) == 3 * 4 + 0.5 * 16


def test_a_budget_below_a_sequence_says_what_is_allowed():
    Limit(sequences=1, tokens=64).check(64)
    Limit(sequences=1).check(10**9)
    with pytest.raises(UserError, match=r"micro_batch_tokens=64: .* 65 .*--micro-batch-tokens 65"):
        Limit(sequences=1, tokens=64).check(65)
    assert Limit(sequences=7).rows(9) == 7 and Limit(sequences=7, tokens=64).rows(9) == 7
    assert Limit(sequences=1, tokens=64).rows(10) == 6


@pytest.mark.parametrize("ranks", [4, 16, 32])
def test_nine_tenths_of_a_step_are_useful_at_lognormal_lengths(ranks):
    """As the benchmark simulates it, on seeds of its own; by count in the order given it is less
    than two thirds."""
    for seed in (11, 12, 13):
        found = balance.trial(balance.Setting(ranks=ranks), seed)
        assert found["budget"] >= 0.9 and found["counted"] < 0.67
        assert found["packed"] >= 0.97 and found["packed"] > found["budget"]


def test_the_benchmark_prints_its_table(capsys):
    balance.main(["--seeds", "1", "--sequences", "16"])
    out = capsys.readouterr().out
    assert "DP32" in out and "lognormal" in out
