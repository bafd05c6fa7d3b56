"""A replay's health figures against Python sets, and by hand."""

import pytest
import torch

from moe_upgrpo.routing.health import FIGURES, count_rows, metrics_of

E, K = 6, 3


def used_map(rows: list[set[int]]) -> torch.Tensor:
    return torch.tensor([[e in row for e in range(E)] for row in rows])


def by_sets(used, given, native, held) -> dict[str, int]:
    """The figures, row by row."""
    found = dict.fromkeys(FIGURES, 0)
    for used_row, given_row, native_row, is_held in zip(used, given, native, held, strict=True):
        found["rows"] += 1
        if min(given_row) < 0 or not is_held:
            continue
        found["given"] += 1
        found["applied"] += used_row == set(given_row)
        if set(given_row) == {0}:
            found["zero_filled"] += 1
        elif len(set(given_row)) < K:
            found["repeated"] += 1
        else:
            found["compared"] += 1
            found["differs"] += set(given_row) != set(native_row)
    return found


ROWS = [  # used, given, native, held
    ({0, 1, 2}, [2, 1, 0], [0, 1, 2], True),  # applied; the router would have chosen the same
    ({3, 4, 5}, [3, 4, 5], [3, 4, 0], True),  # applied, and it made a difference
    ({0, 1, 2}, [3, 4, 5], [0, 1, 2], True),  # not applied
    ({3, 4}, [3, 4, 5], [3, 4, 5], True),  # an expert was dropped
    ({1, 2, 3, 4}, [1, 2, 3], [1, 2, 3], True),  # one was added
    ({0}, [0, 0, 0], [0, 1, 2], True),  # zero-filled, and used so
    ({0, 1, 2}, [0, 0, 0], [0, 1, 2], True),
    ({2, 5}, [5, 2, 5], [2, 5, 1], True),  # repeated
    ({2, 5, 1}, [5, 2, 5], [2, 5, 1], True),
    ({0, 4}, [0, 0, 4], [2, 5, 1], True),  # repeated zeros among others
    ({0, 1, 2}, [-1, -1, -1], [0, 1, 2], True),  # missing
    ({0, 1, 2}, [1, 2, -1], [0, 1, 2], True),
    ({0, 1, 2}, [3, 4, 5], [0, 1, 2], False),  # not meant for the row
    ({0, 1, 2}, [0, 0, 0], [0, 1, 2], False),
]


def test_every_kind_of_row_is_counted_as_by_sets():
    used, given, native, held = (list(x) for x in zip(*ROWS, strict=True))
    found = count_rows(
        used_map(used), torch.tensor(given).int(), torch.tensor(native), torch.tensor([held])
    )
    expected = by_sets(used, given, native, held)
    assert dict(zip(FIGURES, found.tolist(), strict=True)) == expected
    assert expected == {  # by hand, of ROWS
        "rows": 14, "given": 10, "applied": 5, "compared": 5, "differs": 2,
        "zero_filled": 2, "repeated": 3,
    }  # fmt: skip


def test_random_rows_are_counted_as_by_sets():
    generator = torch.Generator().manual_seed(0)
    native = torch.rand(500, E, generator=generator).topk(K).indices
    given = torch.randint(-1, E, (500, K), generator=generator)
    given[::3] = native[::3].flip(1)
    given[5::17] = 0
    used = [
        set(g) - {-1} if i % 4 else set(n)
        for i, (g, n) in enumerate(zip(given.tolist(), native.tolist(), strict=True))
    ]
    found = count_rows(used_map(used), given, native)
    assert dict(zip(FIGURES, found.tolist(), strict=True)) == by_sets(
        used, given.tolist(), native.tolist(), [True] * 500
    )
    assert (found > 0).all()


def test_with_one_expert_a_zero_is_a_route():
    used = torch.tensor([[True, False], [False, True]])
    found = count_rows(used, torch.tensor([[0], [0]]), torch.tensor([[0], [1]]))
    assert dict(zip(FIGURES, found.tolist(), strict=True)) == {
        "rows": 2, "given": 2, "applied": 1, "compared": 2, "differs": 1,
        "zero_filled": 0, "repeated": 0,
    }  # fmt: skip


def test_metrics_are_ratios_of_sums():
    counts = torch.tensor([[10, 8, 6, 4, 1, 3, 1], [10, 10, 10, 6, 3, 0, 4]])
    assert metrics_of(counts, [1, 3]) == {
        "replay/rows": 20,
        "replay/applied_rate": 16 / 20,
        "replay/live_rate": 2 / 20,
        "replay/zero_filled_rate": 3 / 18,
        "replay/repeated_rate": 5 / 18,
        "replay/native_differs_rate": 4 / 10,
        "replay/native_differs/layer_1": 1 / 4,
        "replay/native_differs/layer_3": 3 / 6,
    }


def test_a_replay_that_gave_nothing_is_all_live():
    counts = count_rows(used_map([{0, 1, 2}] * 4))[None]
    assert metrics_of(counts, [0]) == {
        "replay/rows": 4, "replay/applied_rate": 0, "replay/live_rate": 1,
    }  # fmt: skip
    assert metrics_of(torch.zeros(0, len(FIGURES)), []) == {"replay/rows": 0}


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int64])
def test_routes_of_any_integers(dtype):
    ids = torch.tensor([[1, 2, 3]])
    found = count_rows(used_map([{1, 2, 3}]).int(), ids.to(dtype), ids)
    assert found.tolist() == [1, 1, 1, 1, 0, 0, 0]
