"""Problems of files as a model's prompts, and math-verify behind its limit.

Not covered: that math-verify judges well; its own tests do that.
"""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.tasks import MathTask, arithmetic, math_verifier, math_worker
from moe_upgrpo.tasks.base import refill_indices
from moe_upgrpo.tasks.math_verifier import MathVerifier
from tests.tasks.words import VOCABULARY, save_words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_words(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier()
    yield verifier
    verifier.close()


def write(file, *rows):
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return file


def sums(count):
    return [(f"What is {i} and {i}?", 2 * i) for i in range(count)]


@pytest.fixture
def task(model, tmp_path):
    task = MathTask(
        [write(tmp_path / "train.jsonl", *sums(10))],
        [write(tmp_path / "eval.jsonl", ("What is 100 and 1?", 101))],
        model_dir=model,
    )
    yield task
    task.close()


def spoken(text):
    """Token ids of a response, with the end token."""
    return [VOCABULARY[c] for c in text.replace(" ", "Ġ")] + [1]


def prompts(problems):
    return [problem.prompt for problem in problems]


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("46", "46", True),
        ("46", "so it is $\\boxed{46}$.", True),
        ("46", "first \\boxed{45}, no: \\boxed{46}", True),
        ("46", "\\boxed{46}, no: \\boxed{45}", False),
        ("46", "\\boxed{45} and not 46", False),
        ("46", "I do not know", False),
        ("46", "", False),
        ("\\frac{1}{2}", "Answer: 0.5", True),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", True),
        ("Half of 92 is <<92/2=46>>46 eggs.\n#### 46", "The answer is 46.", True),  # GSM8K
        ("Adding gives \\boxed{46}.", "46", True),  # MATH
        ("46", "\\boxed{46}" + " 1" * 20_000, True),  # the box is far from the end
        ("46", " 1" * 20_000, False),  # 5 s where math-verify reads all of it
    ],
)
def test_answers(reference, response, right, verifier):
    assert verifier.right(reference, response) is right
    assert verifier.killed == 0


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "an answer that takes the verifier too long",
    "wrong, and counted; the next is judged",
)
def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_judged():
    """Off the main thread, where math-verify's own timeouts raise."""
    verifier, found = MathVerifier(), []

    def judge():
        found.append(verifier.right("46", "\\boxed{100000000!}"))
        found.append(verifier.right("46", "46"))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join(timeout=60)
    verifier.close()
    assert found == [False, True] and verifier.killed == 1


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "the verifier's worker is stopped",
    "killed after its wall-clock limit; another one judges",
)
@pytest.mark.parametrize("response", ["\\boxed{46}", " 1" * 100_000 + "\\boxed{46}"])
def test_a_worker_that_is_stopped_is_killed_and_another_judges(response, monkeypatch):
    """No processor time passes in it, so that its own limit never comes. The long response does
    not fit into the pipe to it."""
    monkeypatch.setattr(math_verifier, "ANSWER_S", 4.0)
    verifier = MathVerifier()
    assert verifier.right("46", "46") and verifier.killed == 0
    os.kill(verifier._worker.pid, signal.SIGSTOP)
    stopped, begin = verifier._worker, time.monotonic()
    assert verifier.right("46", response) is True
    assert verifier.killed == 1 and time.monotonic() - begin < 60
    assert stopped.returncode == -signal.SIGKILL
    assert verifier.right("46", "45") is False and verifier.killed == 1
    verifier.close()


def test_workers_that_are_silent_again_give_a_wrong_answer(monkeypatch):
    started = []

    def stopped():
        started.append(start())
        os.kill(started[-1].pid, signal.SIGSTOP)
        return started[-1]

    start = math_verifier._start
    monkeypatch.setattr(math_verifier, "_start", stopped)
    monkeypatch.setattr(math_verifier, "ANSWER_S", 0.5)
    verifier = MathVerifier()
    assert verifier.right("46", "46") is False
    assert (len(started), verifier.killed) == (2, 2)
    assert all(worker.poll() is not None for worker in started)


def test_only_the_answer_of_a_reference_is_parsed():
    """math-verify finds it in prose as well, but reads all of that as LaTeX first."""
    assert math_worker._boxed("48/2 = <<48/2=24>>24 clips.\n#### 24") == "\\boxed{24}"
    assert math_worker._boxed("\\frac{1}{2}") == "\\boxed{\\frac{1}{2}}"
    assert math_worker._boxed("so \\boxed{2}") == "so \\boxed{2}"


def test_equal_answers_are_one_class(verifier):
    responses = ["\\boxed{1/2}", "7", "Answer: 0.5", "none", "\\boxed{\\frac{2}{4}}", "$7.0$"]
    assert verifier.classes(responses) == [0, 1, 0, None, 0, 1]
    assert verifier.classes([]) == []


def test_a_task_reads_writes_and_judges(task):
    (heldout,) = task.heldout_problems()
    assert heldout.prompt == "<s>user\nWhat is 100 and 1?</s><s>assistant\n"
    assert heldout.answer == "101"
    # The template's <s> and </s> are one token each, everything else one for each byte.
    assert heldout.prompt_ids[:2].tolist() == [0, VOCABULARY["u"]]
    assert (
        len(heldout.prompt_ids) == task.max_prompt_tokens == len("Xuser\nWhat is 100 and 1?XX") + 10
    )
    assert task.max_response_tokens is None
    assert task.reward(heldout, spoken("It is 101")) == 1.0
    assert task.reward(heldout, np.array(spoken("It is 102"))) == 0.0
    # Special tokens are no part of the text: here <s> inside the number.
    assert task.reward(heldout, [*spoken("10")[:-1], 0, *spoken("1")]) == 1.0
    assert task.answer_classes([spoken("101"), spoken("7"), spoken("It is 101")]) == [0, 1, 0]
    assert [note.split(" ")[0] for note in task.notes] == ["--data", "--eval-data"]


def test_every_epoch_visits_every_problem_once_in_an_order_of_its_own(task):
    """10 problems, 3 a step: 3 steps an epoch, one problem waits."""
    steps = [prompts(task.training_problems(3, seed=5, step=step)) for step in range(1, 7)]
    first, second = [*steps[0], *steps[1], *steps[2]], [*steps[3], *steps[4], *steps[5]]
    assert len(set(first)) == len(set(second)) == 9
    assert first != second
    assert steps[4] == prompts(task.training_problems(3, seed=5, step=5))
    assert steps[0] != prompts(task.training_problems(3, seed=6, step=1))


def test_refills_are_new_problems_of_the_step(task):
    batches = [prompts(task.training_problems(3, seed=5, step=2, refill=r)) for r in range(5)]
    assert [len(batch) for batch in batches] == [3, 3, 3, 0, 0]  # the tenth fills no batch
    assert len({prompt for batch in batches for prompt in batch}) == 9
    assert batches[1] == prompts(task.training_problems(3, seed=5, step=2, refill=1))
    assert batches[1] != prompts(task.training_problems(3, seed=5, step=3, refill=1))
    assert batches[0] == prompts(task.training_problems(3, seed=5, step=2))


def test_refills_of_the_arithmetic_task():
    task = arithmetic.ArithmeticTask(digits=1)
    batches = [prompts(task.training_problems(30, seed=0, step=1, refill=r)) for r in range(5)]
    assert task.training_count == 90  # of 100
    assert [len(batch) for batch in batches] == [30, 30, 30, 0, 0]
    assert len({prompt for batch in batches for prompt in batch}) == 90


def test_refills_are_a_shuffle_by_seed_and_step():
    def drawn(seed, step, refill=1):
        return refill_indices(np.array([1]), 21, 10, seed=seed, step=step, refill=refill).tolist()

    assert sorted(drawn(0, 1) + drawn(0, 1, refill=2)) == [0, *range(2, 21)]
    assert drawn(0, 1, refill=3) == []
    assert len({tuple(drawn(seed, step)) for seed in (0, 1) for step in (1, 2)}) == 4


def test_too_many_problems_asked_for(task):
    for count in (0, 11):
        with pytest.raises(UserError, match="the files have 10"):
            task.training_problems(count, seed=0, step=1)


def test_prompts_that_are_too_long(model, tmp_path):
    train = write(tmp_path / "train.jsonl", ("1+1?", 2), ("1+1 and then some more?", 3))
    heldout = write(tmp_path / "eval.jsonl", ("2+2?", 4))
    task = MathTask([train], [heldout], model_dir=model, max_prompt_tokens=22)
    assert len(task.training_problems(1, seed=0, step=1)) == 1  # the shorter one has 22
    assert "1 training problems of more than 22 tokens left out" in task.notes
    with pytest.raises(UserError, match="a held-out problem has 41 tokens"):
        MathTask([heldout], [train], model_dir=model, max_prompt_tokens=30)
    with pytest.raises(UserError, match="no training problem is that short; the shortest has 22"):
        MathTask([train], model_dir=model, max_prompt_tokens=5)


def test_several_files_and_shared_problems(model, tmp_path):
    one = write(tmp_path / "one.jsonl", *sums(3))
    two = write(tmp_path / "two.jsonl", *sums(5))
    task = MathTask([one, two], [one], model_dir=model)
    assert len(task.training_problems(5, seed=0, step=1)) == 5
    assert "3 held-out problems are training problems as well" in task.notes
    other = write(tmp_path / "other.jsonl", ("What is 0 and 0?", 1))
    with pytest.raises(
        UserError, match=r"other.jsonl, line 1: the answer is '1'.*one.jsonl, line 1"
    ):
        MathTask([one, other], model_dir=model)


def test_chat_templates(model, tmp_path):
    file = tmp_path / "train.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    file.write_text(json.dumps({"prompt": chat, "answer": "2"}) + "\n")

    def prompt(data=file, **options):
        return MathTask([data], model_dir=model, **options).training_problems(1, seed=0, step=1)[0]

    assert prompt().prompt == "<s>system\nBe brief.</s><s>user\n1+1?</s><s>assistant\n"
    thinking = prompt(chat_template_kwargs='{"thinking": true}', instruction=" Think.")
    assert thinking.prompt.endswith("<s>user\n1+1? Think.</s><s>assistant\n<think>")
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[-1].content }}=")
    assert prompt(chat_template=str(own)).prompt == "1+1?="
    plain = prompt(write(tmp_path / "plain.jsonl", ("1+1?", 2)), chat_template="none")
    assert plain.prompt == "1+1?"
    assert plain.prompt_ids.tolist() == [0, *(VOCABULARY[c] for c in "1+1?")]
    with pytest.raises(UserError, match="a chat of 2 messages needs a chat template"):
        prompt(chat_template="none")
    silent = tmp_path / "silent.jsonl"
    chat[0]["content"] = ""
    silent.write_text(json.dumps({"prompt": chat, "answer": 2}))
    assert prompt(silent).prompt == "<s>system\n</s><s>user\n1+1?</s><s>assistant\n"
    assert prompt(silent, chat_template="none").prompt == "1+1?"
    own.write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"line 1: the chat template fails: no system role"):
        prompt(chat_template=str(own))
    for options, words in (
        ({"chat_template": "absent.jinja"}, "neither auto nor none nor a file"),
        ({"chat_template_kwargs": "{"}, "a JSON object is needed"),
        ({"chat_template_kwargs": "[]"}, "a JSON object is needed"),
        ({"chat_template_kwargs": '{"thinkin_": 1}'}, "the chat template has no such name"),
        (
            {"chat_template": "none", "chat_template_kwargs": '{"thinking": true}'},
            "the chat template is not there or not used",
        ),
    ):
        with pytest.raises(UserError, match=words):
            prompt(**options)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    data = [write(tmp_path / "train.jsonl", *sums(1))]
    with pytest.raises(UserError, match="absent does not exist"):
        MathTask(data, model_dir=tmp_path / "absent")
    small = save_words(tmp_path / "small", vocab_size=100)
    with pytest.raises(UserError, match=r"ids up to \d+, the model in .*small has 100 tokens"):
        MathTask(data, model_dir=small)
    other_end = save_words(tmp_path / "other", eos_token_id=[5, 6])
    with pytest.raises(
        UserError, match=r"token 1 \(</s>\), the model's generation stops at \[5, 6\]"
    ):
        MathTask(data, model_dir=other_end)
    characters = save_words(tmp_path / "characters", template=None)
    arithmetic.save_tokenizer(characters)
    (characters / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"line 1: .* no tokens for a part of 'What is.*<unk>"):
        MathTask(data, model_dir=characters)
    spelled = MathTask([write(tmp_path / "sums.jsonl", ("1+1=", 2))], model_dir=characters)
    assert spelled.training_problems(1, seed=0, step=1)[0].prompt_ids.tolist() == [4, 13, 4, 14]


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("moe_upgrpo.tasks.math_verifier.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moe_upgrpo\[math\]'"):
        MathVerifier()
