import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.tasks import ArithmeticTask
from moe_upgrpo.tasks.arithmetic import (
    EOS_ID,
    PAD_ID,
    VOCABULARY,
    decode,
    encode,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def task():
    return ArithmeticTask()


def key(problems):
    return [problem.prompt for problem in problems]


def test_a_problem_is_zero_padded_and_its_answer_is_not(task):
    problem = task.problem(7, 2)
    assert (problem.prompt, problem.answer) == ("07+02=", "9")
    assert decode(problem.prompt_ids) == "07+02="
    assert decode(task.solution_ids(problem)) == "9<eos>"
    assert decode(task.solution_ids(task.problem(99, 99))) == "198<eos>"
    assert len(task.solution_ids(task.problem(99, 99))) == task.max_response_tokens == 4
    assert ArithmeticTask(digits=3).problem(5, 40).prompt == "005+040="


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("57<eos>", 1.0),
        ("57", 0.0),  # not ended
        ("58<eos>", 0.0),
        ("057<eos>", 0.0),  # plain digits only
        ("57<eos><eos>", 0.0),
        ("57<pad><eos>", 0.0),
        ("<eos>", 0.0),
        ("5<eos>7", 0.0),
    ],
)
def test_reward_is_for_the_exact_ended_answer_only(task, response, reward):
    ids = []
    while response:
        token = next(t for t in VOCABULARY if response.startswith(t))
        ids.append(VOCABULARY.index(token))
        response = response[len(token) :]
    assert task.reward(task.problem(23, 34), np.array(ids)) == reward
    assert task.reward(task.problem(23, 34), ids) == reward


def test_training_and_heldout_problems_partition_all_sums(task):
    heldout = set(key(task.heldout_problems()))
    drawn = set(key(task.training_problems(10_000 - len(heldout), seed=0, step=0)))
    assert not heldout & drawn
    assert heldout | drawn == {f"{a:02d}+{b:02d}=" for a in range(100) for b in range(100)}
    # One tenth of 10,000 by a hash: 1,000 with a standard deviation of 30.
    assert 880 < len(heldout) < 1120
    for problem in task.heldout_problems()[:50]:
        a, b = problem.prompt.rstrip("=").split("+")
        assert int(a) + int(b) == int(problem.answer)


def test_the_split_is_pinned(task):
    """Figures of different versions compare only if the held-out problems never change."""
    assert len(task.heldout_problems()) == 1001
    assert key(task.heldout_problems())[:3] == key(ArithmeticTask().heldout_problems())[:3]


def test_training_problems_are_a_function_of_seed_and_step(task):
    first = task.training_problems(32, seed=3, step=7)
    assert key(first) == key(task.training_problems(32, seed=3, step=7))
    assert len(set(key(first))) == 32
    assert key(first) != key(task.training_problems(32, seed=3, step=8))
    assert key(first) != key(task.training_problems(32, seed=4, step=7))


def test_bad_input_is_refused(task):
    with pytest.raises(UserError, match="digits is 4; 1, 2 or 3"):
        ArithmeticTask(digits=4)
    with pytest.raises(UserError, match="8999, and at least 1"):
        task.training_problems(9000, seed=0, step=0)
    with pytest.raises(UserError, match="at least 1"):
        task.training_problems(0, seed=0, step=0)
    with pytest.raises(UserError, match="'x'"):
        encode("12x")


def test_the_saved_tokenizer_agrees_with_ours(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(VOCABULARY) == len(set(VOCABULARY)) == 32
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, EOS_ID)
    text = "".join(token for token in VOCABULARY if len(token) == 1)
    assert len(text) == 29
    for some in (text, "12+34=", "46", " 1  2 "):
        assert tokenizer(some).input_ids == encode(some).tolist()
        assert tokenizer.decode(encode(some)) == some
    assert tokenizer.decode([4, EOS_ID]) == "1<eos>"
