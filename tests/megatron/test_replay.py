"""Routes replayed: in every layout as in one process, with and without recomputation.

That planted routes are the ones used: test_transformers.py.
"""

import numpy as np
import pytest
import torch

from tests.megatron.compare import assert_close, in_order
from tests.megatron.measured import LAYOUTS, RECOMPUTE, as_parameters

MOE = [name for name, (checkpoint, *_) in LAYOUTS.items() if checkpoint != "dense"]


@pytest.mark.bits
@pytest.mark.parametrize("name", as_parameters(["tiny", "mixed", *MOE]))
def test_replaying_a_models_own_routes_changes_nothing_to_the_last_bit(name, measured):
    """Values and gradient, with the experts of each row given in another order."""
    for rank in measured(name):
        for own, native in zip(rank["scored"]["own"], rank["scored"]["native"], strict=True):
            for field in ("log_probs", "entropy", "routes", "own_routes", "margins", "gates"):
                assert np.array_equal(getattr(own, field), getattr(native, field)), field
        for recompute in RECOMPUTE:
            native = rank["gradient"]["native", "none", "up-grpo"]
            own = rank["gradient"]["own", recompute, "up-grpo"]
            assert native.keys() == own.keys()
            for parameter, gradient in native.items():
                assert torch.equal(own[parameter], gradient), (recompute, parameter)


@pytest.mark.parametrize("name", as_parameters(MOE))
def test_planted_routes_give_what_they_give_in_one_process(name, measured):
    ranks, (one,) = measured(name), measured(LAYOUTS[name][0])
    experts = one["about"][2]
    native = one["scored"]["native"]
    actual = in_order(ranks, lambda rank: rank["scored"]["planted"])
    for a, e, n in zip(actual, one["scored"]["planted"], native, strict=True):
        assert np.array_equal(a.routes, np.sort((n.routes + 3) % experts, axis=-1))
        assert np.array_equal(a.own_routes, e.own_routes)
        assert not np.array_equal(a.own_routes, a.routes)
        for field in ("log_probs", "entropy", "margins", "gates"):
            np.testing.assert_allclose(getattr(a, field), getattr(e, field), rtol=0, atol=1e-5)
        assert np.abs(a.log_probs - n.log_probs).max() > 1e-3
    expected = one["gradient"]["planted", "none", "up-grpo"]
    with pytest.raises(AssertionError):  # it is another gradient than the native one
        assert_close(expected, one["gradient"]["native", "none", "up-grpo"], tolerance=1e-2)
    for recompute in RECOMPUTE:
        for rank in ranks:
            assert_close(rank["gradient"]["planted", recompute, "up-grpo"], expected)
        update = in_order(
            ranks, lambda rank, r=recompute: rank["update"]["planted", r, "up-grpo"].scored
        )
        for used, n in zip(update, native, strict=True):
            assert np.array_equal(used.routes, np.sort((n.routes + 3) % experts, axis=-1))
