import json
import math

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.tasks.files import read_problems


def jsonl(tmp_path, *rows, name="train.jsonl"):
    """A file of `rows`; a row that is a text stands there as it is."""
    file = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def parquet(tmp_path, *rows):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def content(data):
    return [(row.prompt, row.answer) for row in data.rows]


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "1+1?", "answer": "2"}, "1+1?", "2"),
        ({"problem": "1+1?", "solution": "so \\boxed{2}"}, "1+1?", "so \\boxed{2}"),
        # MATH-500 has both; the answer is the shorter one.
        ({"problem": "1+1?", "solution": "so \\boxed{2}", "answer": "2"}, "1+1?", "2"),
        # slime
        ({"prompt": [{"role": "user", "content": "1+1?"}], "label": "2"}, (("user", "1+1?"),), "2"),
        # verl: DAPO-Math-17k, AIME-2024
        (
            {
                "data_source": "math_dapo",
                "prompt": [{"content": "1+1?", "role": "user"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "9a9b6eb4"},
            },
            (("user", "1+1?"),),
            "2",
        ),
        ({"prompt": "1+1?", "answer": 2}, "1+1?", "2"),
    ],
)
def test_layouts_that_people_have(write, row, prompt, answer, tmp_path):
    assert content(read_problems(write(tmp_path, row))) == [(prompt, answer)]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_named_fields_come_first(write, tmp_path):
    row = {"prompt": "a", "q": {"text": "1+1?"}, "answer": "b", "r": "2"}
    read = read_problems(write(tmp_path, row), prompt_field="q.text", answer_field="r")
    assert content(read) == [("1+1?", "2")]
    assert read.rows[0].where.endswith(("train.jsonl, line 1", "train.parquet, row 1"))


def test_what_is_left_out_is_counted(tmp_path):
    def row(q, a):
        return {"question": q, "answer": a}

    read = read_problems(
        jsonl(
            tmp_path,
            row("1+1?", "2"),
            "",  # a blank line is no row
            row("1+1?", "2"),  # line 3: again
            row("1+2?", " "),  # line 4: no answer
            row("1+3?", "4"),
            row("1+3?", "5"),  # line 6: another answer
            row("1+3?", "4"),  # line 7: whatever follows it
            row("1+4?", "5"),
        )
    )
    assert content(read) == [("1+1?", "2"), ("1+4?", "5")]
    assert (read.repeated, read.unanswered) == (1, ["line 4"])
    assert read.contradicted == ["line 6", "line 7"]
    said = read.describe()
    for words in (
        "2 problems (prompt from 'question', answer from 'answer')",
        "1 repeated rows used once",
        "1 rows without an answer left out (the first: line 4)",
        "2 rows with another answer to the same question, which is left out (the first: line 6)",
    ):
        assert words in said


NO_NUMBERS = [
    math.nan,
    math.inf,
    -math.inf,
    None,
    "NaN",
    "nan",
    "-nan",
    "inf",
    "-Infinity",
    " NaN ",
]


@pytest.mark.fault(
    "Problems and routes",
    "NaN or infinity as a reference answer",
    "an unanswered problem, counted",
)
@pytest.mark.parametrize("answer", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("nested", [False, True], ids=["answer", "reward_model.ground_truth"])
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_no_number_is_no_answer(write, nested, answer, tmp_path):
    """As numbers (JSON's own NaN, Parquet's floats and nulls) and as texts."""

    def row(question, answer):
        given = {"reward_model": {"ground_truth": answer}} if nested else {"answer": answer}
        return {"question": question} | given

    good = "2" if isinstance(answer, str) else 2.5
    file = write(tmp_path, row("1+1?", good), row("1+2?", answer), row("1+3?", good))
    read = read_problems(file)
    assert content(read) == [("1+1?", str(good)), ("1+3?", str(good))]
    assert len(read.unanswered) == 1 and read.unanswered[0].endswith(" 2")
    with pytest.raises(UserError, match=r"no problems: .*1 rows without an answer left out"):
        read_problems(write(tmp_path, row("1+2?", answer)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_nan_of_a_data_frame_is_no_answer(dtype, tmp_path):
    """pandas writes NaN as null, pyarrow as NaN."""
    frame = pd.DataFrame({"question": list("abcd"), "answer": [1, math.nan, math.inf, 4]})
    frame["answer"] = frame["answer"].astype(dtype)
    frame.to_parquet(tmp_path / "train.parquet")
    read = read_problems(tmp_path / "train.parquet")
    assert content(read) == [("a", "1.0"), ("d", "4.0")] and len(read.unanswered) == 2
    pq.write_table(pa.Table.from_pandas(frame, safe=False), tmp_path / "train.parquet")
    assert content(read_problems(tmp_path / "train.parquet")) == content(read)


def test_a_number_beyond_floats_is_no_answer_and_the_infinity_of_a_limit_is_one(tmp_path):
    rows = ['{"question": "a", "answer": 1e999}', '{"question": "b", "answer": "infinity"}']
    read = read_problems(jsonl(tmp_path, *rows, {"question": "c", "answer": "\\infty"}))
    assert content(read) == [("b", "infinity"), ("c", "\\infty")]
    assert read.unanswered == ["line 1"]


@pytest.mark.fault(
    "Problems and routes",
    "rows whose answers are in different fields",
    "found row by row",
)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_fields_are_found_row_by_row(write, tmp_path):
    """Files of several sources: in JSON Lines a field is absent, in Parquet null."""
    rows = [
        {"question": "1+1?", "label": "2"},
        {"problem": "1+2?", "solution": "so \\boxed{3}"},
        {"question": "1+3?", "answer": "4", "solution": "so \\boxed{5}"},
        {"prompt": "1+4?", "reward_model": {"ground_truth": "5"}, "answer": None},
        {"prompt": "1+5?", "answer": math.nan if write is jsonl else None, "ground_truth": "6"},
    ]
    names = sorted({name for row in rows for name in row})
    if write is parquet:
        rows = [{name: row.get(name) for name in names} for row in rows]
    read = read_problems(write(tmp_path, *rows))
    assert content(read) == [
        ("1+1?", "2"),
        ("1+2?", "so \\boxed{3}"),
        ("1+3?", "4"),
        ("1+4?", "5"),
        ("1+5?", "6"),
    ]
    assert read.prompt_fields == ["question", "problem", "prompt"]
    assert (
        "prompt from 'question' and 'problem' and 'prompt', answer from 'label'" in read.describe()
    )
    # A named field is the only one: null is no answer, and no field a broken row.
    if write is parquet:
        named = read_problems(write(tmp_path, *rows), answer_field="solution")
        assert content(named) == [("1+2?", "so \\boxed{3}"), ("1+3?", "so \\boxed{5}")]
        assert len(named.unanswered) == 3
    else:
        with pytest.raises(UserError, match=r"4 row\(s\) cannot be used. line 2: the answer is mi"):
            read_problems(write(tmp_path, *rows), answer_field="label")


@pytest.mark.fault(
    "Problems and routes",
    "an empty system message",
    "accepted",
)
@pytest.mark.parametrize("said", ["", None])
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_an_empty_system_message(write, said, tmp_path):
    chat = [{"role": "system", "content": said}, {"role": "user", "content": "1+1?"}]
    read = read_problems(write(tmp_path, {"prompt": chat, "answer": "2"}))
    assert content(read) == [((("system", ""), ("user", "1+1?")), "2")]
    for bad in ([chat[0]], [*chat, chat[0]], [{"role": "user", "content": said}, chat[1]]):
        with pytest.raises(UserError, match="the prompt is"):
            read_problems(write(tmp_path, {"prompt": bad, "answer": "2"}))


@pytest.mark.fault(
    "Problems and routes",
    "a broken line of a data file",
    "named with its number",
)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param('{"question": ' + "[" * 100_000, "line 2: no.* JSON", id="brackets"),
        pytest.param('{"question": "a", "answer": ' + "9" * 5000 + "}", "line 2: no JSON", id="9s"),
        ('{"question": "1+1?"', r"line 2: not JSON \(.*, character 20"),
        ("[1]", "line 2: an object .* is needed"),
        ('"text"', "line 2: an object .* is needed"),
        ('{"question": "1+1?"}', "line 2: the answer is missing; a text or a number"),
        ('{"answer": "2"}', "line 2: the prompt is missing; a text is needed, or a list"),
        ('{"question": "", "answer": "2"}', "line 2: the prompt is ''"),
        ('{"question": "1+1?", "answer": true}', "line 2: the answer is True"),
        ('{"question": "1+1?", "answer": ["2"]}', "line 2: the answer is \\['2'\\]"),
        ('{"question": [{"role": "user"}], "answer": "2"}', "line 2: the prompt is \\[{'role'"),
        (
            '{"question": [{"role": "assistant", "content": "a"}], "answer": "2"}',
            "the last one not the assistant's",
        ),
    ],
)
def test_a_broken_line_is_named(line, words, tmp_path):
    file = jsonl(tmp_path, {"question": "1+0?", "answer": "1"}, line)
    with pytest.raises(UserError, match=words):
        read_problems(file)
    with pytest.raises(UserError, match=r"train.jsonl: 1 row\(s\) cannot be used"):
        read_problems(file)


def test_bytes_that_are_no_text_are_named(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"question": "1+0?", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_problems(file)


def test_many_broken_lines_are_counted_and_five_named(tmp_path):
    file = jsonl(tmp_path, *[{"question": str(i)} for i in range(9)])
    with pytest.raises(UserError) as error:
        read_problems(file)
    text = str(error.value)
    assert "9 row(s)" in text and "line 5:" in text and "line 6:" not in text
    assert "and 4 more" in text


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_file_without_known_fields_says_what_it_has(write, tmp_path):
    file = write(tmp_path, {"text": "1+1?", "answer": "2"})
    with pytest.raises(UserError, match=r"'prompt' or 'question'.*it has 'text', 'answer'"):
        read_problems(file)
    file = write(tmp_path, {"prompt": "1+1?", "output": "2"})
    with pytest.raises(UserError, match=r"'prompt', 'output' \(--answer-field names another\)"):
        read_problems(file)
    with pytest.raises(UserError, match="a field 'outptu' is needed"):
        read_problems(file, answer_field="outptu")


def test_files_that_hold_no_problem(tmp_path):
    for rows in ([], [""], [{"question": "1+1?", "answer": ""}]):
        with pytest.raises(UserError, match=r"train.jsonl has no problems"):
            read_problems(jsonl(tmp_path, *rows))
    with pytest.raises(UserError, match=r"absent.jsonl: No such file"):
        read_problems(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"absent.parquet: "):
        read_problems(tmp_path / "absent.parquet")
    with pytest.raises(UserError, match=r"train.csv: data files end with .jsonl"):
        read_problems(jsonl(tmp_path, {"question": "1+1?", "answer": "2"}, name="train.csv"))
    file = parquet(tmp_path, {"question": "1+1?", "answer": "2"})
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train.parquet is truncated or not a Parquet file"):
        read_problems(file)
