"""Conversations of several turns, on the engine that is transformers, and what counts of them."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.batch import Sample, make_batch
from moe_upgrpo.rollout.base import SamplingConfig
from moe_upgrpo.rollout.cache import load_rollouts, save_rollouts
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.rollout.turns import converse, joined, longest
from moe_upgrpo.tasks import Problem
from moe_upgrpo.tasks.arithmetic import EOS_ID, ArithmeticTask, encode
from moe_upgrpo.tasks.rewarded import RewardedTask
from moe_upgrpo.train.batch import Batch, Group, Rewarding
from moe_upgrpo.train.learner import for_update, samples_of
from tests.rollout.test_cache import rollout, same

RESULT = np.array([7, 8, 9])


def asks(most=3):
    """A task that answers each turn with the same three tokens."""
    return SimpleNamespace(
        max_turns=most, max_observation_tokens=3, observe=lambda problem, ids: RESULT
    )


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return HFEngine(tiny_checkpoint, dtype="float32", device="cpu")


def problems(*prompts):
    return [Problem(prompt="", prompt_ids=np.array(p), answer="") for p in prompts]


@pytest.fixture(scope="module")
def talks(engine):
    sampling = SamplingConfig(max_new_tokens=38)
    asked = problems([3, 4, 5], [6, 5, 4, 3])
    return converse(engine, asks(), asked, sampling, samples_per_prompt=16, seed=1)


def turns(rollout):
    """Turns of the model in a response, told by what was sampled."""
    found, starts = [], np.flatnonzero(np.diff(rollout.sampled_or_all.astype(int), prepend=0) == 1)
    for start in starts:
        length = np.argmin(np.append(rollout.sampled_or_all[start:], False))
        found.append(rollout.response_ids[start : start + length])
    return found


def test_a_turn_follows_each_end_token_until_there_have_been_enough(talks):
    assert len(talks) == 32
    counts = [len(turns(r)) for r in talks]
    assert {*counts} == {1, 2, 3}  # a model of few tokens ends now and then
    for talk, count in zip(talks, counts, strict=True):
        said = turns(talk)
        assert all(ids[-1] == EOS_ID and EOS_ID not in ids[:-1] for ids in said[:-1])
        assert talk.finished == (said[-1][-1] == EOS_ID)
        assert count == 3 or not talk.finished
        expected = [t for ids in said for t in (*RESULT, *ids)][len(RESULT) :]
        assert talk.response_ids.tolist() == expected
        if count > 1:
            assert (talk.logp_rollout[~talk.sampled] == 0).all()
            assert (~talk.sampled).sum() == 3 * (count - 1)


def test_log_probs_and_routes_are_those_of_one_pass_over_all_of_it(talks, engine, tiny_checkpoint):
    """Log-probs by transformers; the routes, results' among them, by the engine in one pass."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    several = [r for r in talks if len(turns(r)) > 1]
    assert several
    for talk in several:
        whole = np.concatenate([talk.prompt_ids, talk.response_ids])
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(whole)[None]).logits[0]
        logp = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(whole)[1:, None])[:, 0]
        given = logp[len(talk.prompt_ids) - 1 :].numpy()[talk.sampled]
        np.testing.assert_allclose(talk.logp_rollout[talk.sampled], given, atol=1e-4)
        (routes,) = engine.routes([whole])
        assert (np.sort(talk.routes) == np.sort(routes)).all()


def test_one_turn_is_the_engine_s_own(engine):
    sampling = SamplingConfig(max_new_tokens=4)
    asked = problems([3, 4, 5])
    plain = engine.generate([asked[0].prompt_ids], sampling, samples_per_prompt=3, seed=1)
    again = converse(engine, ArithmeticTask(), asked, sampling, samples_per_prompt=3, seed=1)
    assert all(same(a, b) for a, b in zip(plain, again, strict=True))
    assert again[0].sampled is None
    assert longest(ArithmeticTask(), 4) == 4 and longest(asks(), 4) == 3 * 4 + 2 * 3


def test_results_are_no_part_of_loss_lengths_and_files(talks, tmp_path):
    talk = next(r for r in talks if len(turns(r)) == 2)
    (sample,) = for_update(samples_of([talk]), np.array([0.5]), None, 0)
    batch = make_batch([sample])
    first = len(talk.prompt_ids) - 1
    assert batch.mask_BS[0, first : first + len(talk.sampled)].tolist() == talk.sampled.tolist()
    assert batch.mask_BS.sum() == sum(map(len, turns(talk)))
    plain = Sample(tokens=sample.tokens, prompt_length=sample.prompt_length)
    assert make_batch([plain]).mask_BS.sum() == len(talk.response_ids)
    save_rollouts(tmp_path, 1, 0, [talk, next(r for r in talks if r.sampled is None)])
    back = load_rollouts(tmp_path, 1)
    assert same(back[0], talk) and back[1].sampled is None
    # DAPO's penalty counts what the model wrote: nothing is over a limit that the sampled keep.
    count = int(talk.sampled.sum())
    rewarding = Rewarding(seed=0, max_length=count + 1, overlong_buffer=1)
    verdict = SimpleNamespace(reward=1.0, correct=1.0)
    one = Batch(groups=[Group(rollouts=[talk], verdicts=[verdict])], sampled=None)
    assert rewarding.rewards(one, 1, first_prompt=0).tolist() == [1.0]


def test_weights_that_change_between_turns():
    before, reply = rollout(3, 4), rollout(8, 2)
    reply.weight_version = 8
    with pytest.raises(UserError, match="weight version 8, the one before it with 7"):
        joined(before, np.array([1]), reply)


def test_a_tool_that_fails_ends_its_conversation_and_counts():
    class Tool(ArithmeticTask):
        max_turns, max_observation_tokens = 2, 2

        def observe(self, problem, response_ids):
            said = {"1": encode("+"), "2": None, "3": encode("+++"), "4": "text"}
            return said[chr(ord("0") + response_ids[0] - 3)]

    task = RewardedTask(Tool())
    problem = task.problem(12, 34)
    responses = [np.array([*encode(text), EOS_ID]) for text in "12345"]
    results = [task.observe(problem, ids) for ids in responses]
    assert results[0].tolist() == encode("+").tolist() and results[1:] == [None] * 4
    verdicts = task.judge([problem] * 5, responses)
    assert [v.failed.partition(":")[0] for v in verdicts] == ["", "", *["Tool.observe"] * 3]
    for verdict, words in zip(verdicts[2:], (r"(3,)", "<U4", "KeyError: '5'"), strict=True):
        assert words in verdict.failed
    assert not task.judge([problem], [responses[2]])[0].failed  # told once


class Instant:
    """An engine whose responses end at once, and say where they stand in their batch."""

    def generate(self, prompts, sampling, *, samples_per_prompt, seed):
        return [
            replace(
                rollout(len(prompt), 2),
                prompt_ids=np.asarray(prompt),
                response_ids=np.array([i, EOS_ID]),
                finished=True,
            )
            for prompt in prompts
            for i in range(samples_per_prompt)
        ]


class Tool(ArithmeticTask):
    """A tool that answers with what the response begins with, by a way of its own."""

    max_turns, max_observation_tokens = 2, 2

    def __init__(self, says, **more):
        super().__init__()
        self.says = says
        vars(self).update(more)

    def observe(self, problem, response_ids):
        return self.says(int(response_ids[0]))


def talked(tool, **options):
    task = RewardedTask(tool, **options)
    found = converse(
        Instant(),
        task,
        problems([3]),
        SamplingConfig(max_new_tokens=2),
        samples_per_prompt=4,
        seed=1,
    )
    return task, found


def test_tools_of_a_batch_are_asked_at_the_same_time_and_answer_in_its_order():
    met = threading.Barrier(4)

    def says(first):
        met.wait(timeout=20)  # broken unless all four are here
        time.sleep((3 - first) / 20)  # the last one answers first
        return np.array([20 + first])

    _, found = talked(Tool(says))
    assert [r.response_ids[2] for r in found] == [20, 21, 22, 23]

    async def waits(first):
        await asyncio.sleep(0)
        return [30 + first]

    _, found = talked(Tool(waits))
    assert [r.response_ids[2] for r in found] == [30, 31, 32, 33]


def test_tools_that_are_not_for_threads_are_asked_one_after_the_other():
    inside, most = [], []

    def says(first):
        inside.append(first)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(first)
        return [20 + first]

    _, found = talked(Tool(says, tools_at_once=1))
    assert most == [1] * 4 and [r.response_ids[2] for r in found] == [20, 21, 22, 23]


def test_one_tool_that_hangs_or_raises_or_says_nothing_is_the_only_one_that_failed():
    """Each call has the limit from its own start: the hanging one holds one of two places."""
    hung = threading.Event()

    def says(first):
        if first == 0:
            hung.wait(20)
        if first == 1:
            raise OSError("no such host")
        return np.array([]) if first == 2 else [20]

    task, found = talked(Tool(says, tools_at_once=2), timeout_s=0.5)
    hung.set()
    assert [len(r.response_ids) for r in found] == [2, 2, 2, 5]
    verdicts = task.judge(problems([3]) * 4, [r.response_ids for r in found])
    for verdict, words in zip(
        verdicts, ("no answer in 0.5 s", "no such host", "(0,)", ""), strict=True
    ):
        assert words in verdict.failed and bool(verdict.failed) == bool(words)
    assert [v.killed for v in verdicts] == [1, 0, 0, 0] and task.killed == 1
