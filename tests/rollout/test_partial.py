"""Responses that go on under other weights, by HFEngine, held against teacher-forced forwards."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from transformers import Qwen3MoeConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import SamplingConfig
from moe_upgrpo.rollout.cache import load_rollouts, save_rollouts
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.rollout.partial import go_on, unfinished
from tests.rollout.test_hf import MOE, prompts, reference, saved, weights_of

SAMPLING = SamplingConfig(max_new_tokens=9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [saved(tmp_path_factory.mktemp(f"m{i}"), Qwen3MoeConfig(**MOE), i) for i in range(3)]


@pytest.fixture(scope="module")
def sampled(folders):
    """Four tokens by version 0, four by version 1, the rest by version 2."""
    engine = HFEngine(folders[0], "float32", "cpu")
    first = SamplingConfig(max_new_tokens=4)
    rollouts = [engine.generate(prompts(3, 7, 5), first, samples_per_prompt=4, seed=0)]
    for version, most in ((1, 4), (2, None)):
        engine.update_weights(weights_of(folders[version]).items(), version=version)
        rollouts.append(go_on(engine, rollouts[-1], SAMPLING, most=most, seed=version))
    return rollouts


def test_each_token_keeps_the_log_prob_the_routes_and_the_version_of_what_sampled_it(
    sampled, folders
):
    by_version = [0, 0, 0]
    for rollout in sampled[-1]:
        T = len(rollout.response_ids)
        assert rollout.versions_or_all.tolist() == ([0] * 4 + [1] * 4 + [2])[:T]
        assert rollout.finished or T == 9
        for version, folder in enumerate(folders):
            mine = rollout.versions_or_all == version
            if not mine.any():
                continue
            by_version[version] += int(mine.sum())
            logp_T, routes = reference(folder, rollout, 1.0)
            np.testing.assert_allclose(rollout.logp_rollout[mine], logp_T[mine], atol=2e-5)
            rows = len(rollout.prompt_ids) - 1 + np.flatnonzero(mine)
            np.testing.assert_array_equal(np.sort(rollout.routes)[rows], routes[rows])
    assert min(by_version) > 0


def test_what_was_sampled_stays_and_finished_responses_are_left_alone(sampled):
    for before, after in pairwise(sampled):
        going = unfinished(before, 9)
        assert going
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            assert (one is not other) == (i in going)
            T = len(one.response_ids)
            assert other.response_ids[:T].tolist() == one.response_ids.tolist()
            assert other.logp_rollout[:T].tolist() == one.logp_rollout.tolist()
            assert np.array_equal(other.routes[: len(one.routes)], one.routes)
    assert any(r.finished for r in sampled[1])  # or nothing was left alone
    assert not unfinished(sampled[-1], 9)


def test_versions_are_saved_and_loaded(sampled, tmp_path):
    save_rollouts(tmp_path, 1, 0, sampled[-1])
    loaded = load_rollouts(tmp_path, 1)
    assert any(r.versions is not None for r in loaded)
    assert [r.versions_or_all.tolist() for r in loaded] == [
        r.versions_or_all.tolist() for r in sampled[-1]
    ]


@pytest.mark.parametrize("versions", [[0, 1], [1, 0, 0, 0], [0, 1, 0, 1], [0.0, 0, 0, 1]])
def test_versions_that_cannot_be_are_refused(versions, sampled):
    whole = next(r for r in sampled[0] if len(r.response_ids) == 4)
    given = np.array(versions, np.float32 if isinstance(versions[0], float) else np.int32)
    with pytest.raises(UserError, match=r"int32 \(4,\), ascending from 0, are needed"):
        replace(whole, versions=given)
