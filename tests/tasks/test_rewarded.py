"""Tasks judged by rewards of `--reward`, and tasks of one's own.

A reward's process is tested in tests/rewards, whole runs in tests/train/test_families.py and
tests/test_wheel.py.
"""

import json
import sys
import time

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.tasks import ArithmeticTask, MathTask, judged, register_task
from moe_upgrpo.tasks import named as named_module
from moe_upgrpo.tasks.arithmetic import encode
from moe_upgrpo.tasks.named import check_task, make_task
from moe_upgrpo.tasks.rewarded import RewardedTask, reward_by_source, text_of
from tests.tasks.words import save_words

SUMS = ArithmeticTask()
PROBLEM = SUMS.problem(12, 34)
END = [1]


def said(text):
    return np.array([*encode(text), *END])


def rewarded(*rewards, **options):
    return RewardedTask(SUMS, rewards, **options)


def test_several_rewards_are_weighted_and_added_and_the_first_says_what_is_right():
    task = rewarded("exact", "0.25*length:2", r"2*tests.rewards.own:named")
    right, wrong = judged(task, [PROBLEM, PROBLEM], [said("46"), said("4")])
    task.close()
    # "46" and its end are 3 tokens: half of what 2 would earn; `named` gives twice the characters.
    assert right.reward == 1 + 0.25 * 0.5 + 2 * 4 and right.correct == 1
    assert right.parts == {
        **{"exact": 1, "length": 0.5, "named": 4, "named.acc": 1, "named.length": 3}
    }
    assert right.terms == {"exact": (1, 1), "length": (0.25, 0.5), "named": (2, 4)}
    assert wrong.reward == 0 + 0.25 * 1 + 2 * 2 and wrong.correct == 0
    assert task.answer_classes([said("46"), said("4"), said("46")]) == [0, 1, 0]


def test_one_reward_s_own_word_for_right_holds():
    """It earns 2 for each character, and is right by `acc`."""
    task = rewarded("tests.rewards.own:named")
    verdicts = task.judge([PROBLEM] * 2, [said("46"), said("44")])
    task.close()
    assert [(v.reward, v.correct) for v in verdicts] == [(4, 1), (4, 0)]
    assert verdicts[0].parts == {"named.acc": 1, "named.length": 3}


def test_failures_are_told_and_counted_or_end_the_run(capfd):
    task = RewardedTask(SUMS, ["tests.rewards.own:half"], text=lambda ids: "raises")
    verdicts = task.judge([PROBLEM] * 5, [said("46")] * 5)
    assert [v.reward for v in verdicts] == [0] * 5 and all(v.failed for v in verdicts)
    errors = capfd.readouterr().err
    assert errors.count("problem '12+34=': tests.rewards.own:half: KeyError") == 3
    assert errors.count("more of this kind are only counted") == 1
    task._ends = True
    with pytest.raises(UserError, match=r"'12\+34=': .*KeyError.* --reward-failures count goes on"):
        task.judge([PROBLEM], [said("46")])
    task.close()


class Own:
    """A task as a user writes it, which fails as its response says."""

    max_prompt_tokens, max_response_tokens = 6, 4

    def __init__(self, model_dir, digits=2):
        self.sums = ArithmeticTask(digits)

    def training_problems(self, count, *, seed, step, refill=0):
        return self.sums.training_problems(count, seed=seed, step=step, refill=refill)

    def heldout_problems(self):
        return []

    def reward(self, problem, response_ids):
        text = text_of(response_ids)
        if text == "9":
            time.sleep(2)
        return {"4": 0.5, "46": {"score": 3, "kept": 2}, "0": float("nan"), "7": [1, 2]}[text]


class Hurried(Own):
    tools_at_once = 0


def test_a_task_of_ones_own_is_held_to_its_time_and_to_numbers(tmp_path, capfd):
    own = make_task("tests.tasks.test_rewarded:Own", tmp_path, '{"digits": 1}')
    assert own.sums.digits == 1
    task = RewardedTask(own, timeout_s=0.2)
    texts = ("4", "46", "0", "7", "9", "5")
    verdicts = task.judge([PROBLEM] * 6, [said(text) for text in texts])
    assert [v.reward for v in verdicts] == [0.5, 3, 0, 0, 0, 0]
    assert [v.killed for v in verdicts] == [0, 0, 0, 0, 1, 0] and task.killed == 1
    assert verdicts[1].parts == {"kept": 2} and verdicts[1].correct == 1
    for verdict, words in zip(
        verdicts[2:],
        ("gave nan", "gave [1, 2]", "no answer in 0.2 s", "KeyError: '5'"),
        strict=True,
    ):
        assert words in verdict.failed and verdict.failed.startswith("Own.reward: ")
    assert task.answer_classes([said("4"), said("5"), said("4")]) == [0, 1, 0]
    assert task.max_prompt_tokens == 6  # the task's
    task.close()


@pytest.mark.parametrize(
    ("word", "options", "words"),
    [
        (
            "mine2",
            "{}",
            "module:Class or FILE.py:Class is needed; known names: mine \\(nearest: mine",
        ),
        ("tests.tasks.test_rewarded:Own", "[]", "a JSON object is needed"),
        ("tests.tasks.test_rewarded:Own", '{"digit": 1}', "unexpected keyword argument 'digit'"),
        ("tests.tasks.test_rewarded:Absent", "{}", "no attribute 'Absent'"),
        ("absent_module:Own", "{}", "No module named 'absent_module'"),
        ("tests.tasks.test_rewarded:Hurried", "{}", "tools_at_once=0; allowed: a whole number"),
        ("pathlib:Path", "{}", "has no max_prompt_tokens, max_response_tokens, training_problems"),
    ],
)
def test_tasks_that_are_none(word, options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(named_module, "TASKS", {})
    register_task("mine", Own)
    with pytest.raises(UserError, match=words):
        make_task(word, tmp_path, options)
    assert isinstance(make_task("mine", tmp_path, "{}"), Own)
    assert check_task("mine", '{"digits": 1}') == {"digits": 1}


def test_a_task_in_the_current_folder(tmp_path, monkeypatch):
    text = "from tests.tasks.test_rewarded import Own\nclass Here(Own): pass\n"
    (tmp_path / "task_here.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert type(make_task("task_here:Here", tmp_path, "{}")).__name__ == "Here"


def test_data_sources_of_files_choose_the_reward(tmp_path):
    model = save_words(tmp_path / "model")
    rows = [
        {"question": "1+1?", "answer": "#### 2", "data_source": "openai/gsm8k", "hint": "a"},
        {"question": "1+2?", "answer": "3", "data_source": "mine"},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = MathTask([file], model_dir=model)
    assert reward_by_source(task) == "gsm8k for 1 problems, math for 1 problems"
    assert [p.row for p in task.all_training_problems] == [
        {"data_source": "openai/gsm8k"}, {"data_source": "mine"},
    ]  # fmt: skip
    judge = RewardedTask(task, ["data-source:math"], text=lambda ids: ids)
    one, two = task.all_training_problems
    answers = ["#### 2", "the answer is 2", "the answer is 3"]
    verdicts = judge.judge([one, one, two], answers)
    assert [v.correct for v in verdicts] == [1, 0, 1]
    judge.close()
    whole = MathTask([file], model_dir=model, whole_rows=True, verifier=False)
    assert whole.all_training_problems[0].row == rows[0]
    with pytest.raises(UserError, match="data_source is 'mine'"):
        RewardedTask(whole, ["data-source"])
    file.write_text(json.dumps(rows[1]))
    plain = MathTask([file], model_dir=model)
    assert reward_by_source(plain) == ""


def test_a_task_without_texts_takes_no_reward():
    with pytest.raises(UserError, match=r"reward='exact' with a task of Own.*no `text"):
        RewardedTask(Own(None), ["exact"])
