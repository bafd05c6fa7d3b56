import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import Rollout, SamplingConfig, routes_dtype


def fields(**changed):
    return {
        "prompt_ids": np.array([5, 6, 7]),
        "response_ids": np.array([8, 1]),
        "logp_rollout": np.array([-0.5, -0.25], dtype=np.float32),
        "routes": np.zeros((4, 2, 2), dtype=np.uint8),
        "weight_version": 3,
        "finished": True,
    } | changed


def test_a_whole_rollout_is_taken():
    rollout = Rollout(**fields())
    assert rollout.routes.shape[0] == len(rollout.prompt_ids) + len(rollout.response_ids) - 1
    Rollout(**fields(routes=np.zeros((4, 0, 0), dtype=np.uint8)))  # a dense model


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        # One row too many and one too few: the off-by-one that looks like a routing mismatch.
        ({"routes": np.zeros((5, 2, 2), np.uint8)}, r"\[5, 6, 7\] -> \[8, 1\] have 5 rows.* = 4"),
        ({"routes": np.zeros((3, 2, 2), np.uint8)}, "have 3 rows"),
        ({"routes": np.zeros((4, 2, 2), np.int64)}, "int64.*unsigned"),
        ({"routes": np.zeros((4, 4), np.uint8)}, r"uint8 \(4, 4\)"),
        (
            {"logp_rollout": np.array([-1, np.nan], np.float32)},
            r"\[5, 6, 7\] -> \[8, 1\] is nan at response position 1.*weight version 3",
        ),
        ({"logp_rollout": np.array([-np.inf, -1], np.float32)}, "-inf at response position 0"),
        ({"logp_rollout": np.array([-1.0, -1.0])}, "float64"),
        ({"logp_rollout": np.array([-1.0], np.float32)}, r"\(1,\); float32 \(2,\)"),
        ({"response_ids": np.array([], dtype=int)}, "response_ids is int64"),
        ({"prompt_ids": np.array([1.0])}, "prompt_ids is float64"),
        ({"prompt_ids": np.array([[1]])}, "prompt_ids is int64"),
    ],
)
def test_a_broken_rollout_is_refused_by_name(changed, message):
    with pytest.raises(UserError, match=message):
        Rollout(**fields(**changed))


@pytest.mark.parametrize(
    ("experts", "dtype"), [(0, "uint8"), (8, "uint8"), (256, "uint8"), (257, "uint16")]
)
def test_routes_take_the_smallest_unsigned_type(experts, dtype):
    assert routes_dtype(experts) == np.dtype(dtype)


def test_sampling_refuses_what_would_change_the_distribution():
    assert SamplingConfig(max_new_tokens=4).logp_temperature == 1.0
    assert SamplingConfig(max_new_tokens=4, temperature=0.5).logp_temperature == 0.5
    assert SamplingConfig(max_new_tokens=4, temperature=0.0).logp_temperature == 1.0
    SamplingConfig(max_new_tokens=4, top_k=-1, top_p=1.0)
    for bad, message in [
        ({"top_p": 0.9}, "top_p is 0.9.*log-probs"),
        ({"top_k": 20}, "top_k is 20.*log-probs"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            SamplingConfig(**{"max_new_tokens": 4} | bad)
