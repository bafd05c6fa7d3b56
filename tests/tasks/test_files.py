import json

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


@pytest.mark.parametrize(
    ("line", "words"),
    [
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
