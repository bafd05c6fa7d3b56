"""Built-in rewards on responses judged by hand; gsm8k also against verl's own."""

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.rewards import REWARDS, Question, read_rewards, register_reward
from moe_upgrpo.rewards.functions import choice, exact, form, gsm8k, length, regex
from moe_upgrpo.rewards.named import by_source
from tests.rewards import own


def asked(answer, **more):
    return Question(prompt="?", answer=answer, **more)


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("B", "The answer is B", 1),
        ("B", "The answer is B.", 1),
        ("(B)", "Answer: (B)", 1),
        ("B", "**Answer:** B", 1),
        ("B", "so \\boxed{B}", 1),
        ("B", "so $\\boxed{\\text{(B)}}$", 1),
        ("B", "A is wrong.\nB", 1),
        ("B", "I think\nB) it is blue", 1),
        ("B", "The answer is A. No: the answer is B", 1),
        ("B", "The correct option is B", 1),
        ("B", "The answer is A or B", 0),
        ("B", "Answer: A, B", 0),
        ("B", "\\boxed{A} and B", 0),
        ("B", "Bananas", 0),
        ("A", "The answer is Apples", 0),
        ("A", "A man walks into a bar", 0),
        ("B", "", 0),
        ("J", "answer: J", 1),
    ],
)
def test_multiple_choice(answer, response, right):
    assert choice(asked(answer), response, {}) == right


def test_a_choice_by_its_place():
    row = {"choices": ["red", "blue"]}
    assert choice(asked("1"), "The answer is B", row) == 1
    assert choice(asked("0"), "The answer is B", {"choices": {"text": ["red", "blue"]}}) == 0
    for answer, of in (("2", row), ("0", {}), ("blue", row)):
        with pytest.raises(ValueError, match="choice: the answer"):
            choice(asked(answer), "B", of)


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("72", "48/2 = 24\n#### 72", 1),
        ("72", "#### 71\n#### 72", 1),
        ("So 72 eggs\n#### 72", "#### 72", 1),
        ("1,200", "#### 1200", 1),
        ("1200", "#### $1,200", 1),
        ("-3", "#### -3", 1),
        ("72", "#### 72.", 1),
        ("0.5", "#### 0.50", 1),
        ("72", "The answer is 72", 0),
        ("72", "#### 720", 0),
        ("72", "####", 0),
    ],
)
def test_gsm8k(answer, response, right):
    assert gsm8k(asked(answer), response, {}) == right


@pytest.mark.slow
def test_gsm8k_is_verls_where_both_are_strict():
    verl = pytest.importorskip("verl.utils.reward_score.gsm8k")
    for response in ("#### 72", "#### 7,2", "72", "#### 71 #### 72", "#### 72\n#### 71", "####"):
        assert gsm8k(asked("72"), response, {}) == verl.compute_score(response, "72")


def test_exact_regex_format_and_length():
    assert exact(asked("New  York"), " New York\n", {}) == 1
    assert exact(asked("New York"), "new york", {}) == 0
    assert regex(asked("46"), "a=45, a=46", {}, r"a=(\d+)") == 1
    assert regex(asked("46"), "a=46, a=45", {}, r"a=(\d+)") == 0
    assert regex(asked("46"), "none", {}, r"a=(\d+)") == 0
    assert regex(asked("46"), "so done", {}, "done") == 1
    said = "<think>1\n2</think>\n<answer>3</answer>"
    assert form(asked(""), said, {}) == 1
    assert form(asked(""), said + said, {}) == form(asked(""), "3", {}) == 0
    assert form(asked(""), "a\nb", {}, "a.b") == 1
    assert form(asked(""), "a\nbc", {}, "a.b") == 0
    assert [length(asked("", tokens=n), "", {}, "10") for n in (1, 10, 15, 20, 30)] == [
        *(1, 1, 0.5, 0, 0)
    ]


def test_words_of_rewards():
    first, second, third, fourth = read_rewards(
        ["math", "0.5*regex:a: (b*c)", "1e-2*own.rewards:of.mine", "here/rewards.py:other"]
    )
    assert (first.label, first.weight, first.text) == ("math", 1, None)
    assert (second.label, second.weight, second.text) == ("regex", 0.5, "a: (b*c)")
    assert (third.label, third.weight, third.place) == ("mine", 0.01, "own.rewards:of.mine")
    assert fourth.place == "here/rewards.py:other"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gsm8", "allowed are math, exact, .*nearest: gsm8k"),
        ("1.2.3*math", "the weight '1.2.3' is no number"),
        ("regex", "regex:TEXT is needed"),
        ("regex:(", "is no regular expression"),
        ("length:many", "a number of tokens is needed"),
        ("math:x", "math takes no text"),
        ("data-source:regex", "stands the reward of rows whose data_source is not known"),
    ],
)
def test_words_that_name_no_reward(word, said):
    with pytest.raises(UserError, match=said):
        read_rewards([word])


def test_two_of_a_name():
    with pytest.raises(UserError, match="half given twice"):
        read_rewards(["tests.rewards.own:half", "other:half"])


def test_registered_rewards(monkeypatch):
    monkeypatch.setattr("moe_upgrpo.rewards.named.REWARDS", known := dict(REWARDS))
    register_reward("mine", own.half)
    register_reward("mine", own.half)  # a plug-in that is loaded twice
    assert known["mine"] == "tests.rewards.own:half"
    for name, function, said in (
        ("math", own.half, "none of the names that are taken"),
        ("a b", own.half, "letters, digits"),
        ("other", lambda *_: 1.0, "cannot be imported by a worker"),
    ):
        with pytest.raises(UserError, match=said):
            register_reward(name, function)


def test_verls_data_sets_choose_their_reward():
    names = ("openai/gsm8k", "lighteval/MATH", "aime2024", "codecontests", "mine", None)
    found = [by_source({"data_source": name}, otherwise="exact") for name in names]
    assert found == ["gsm8k", "math", "math", "code", "exact", "exact"]
    for odd in (["openai/gsm8k"], {"name": "math"}, 7):
        assert by_source({"data_source": odd}, otherwise="exact") == "exact"
        with pytest.raises(UserError, match=r"data_source is .*allowed"):
            by_source({"data_source": odd}, otherwise=None)
    with pytest.raises(UserError, match=r"data_source is 'openai/gsm8'.*nearest: openai/gsm8k"):
        by_source({"data_source": "openai/gsm8"}, otherwise=None)
    with pytest.raises(UserError, match="for a reward model to judge"):
        by_source({"data_source": "math", "reward_model": {"style": "model"}}, otherwise="math")
