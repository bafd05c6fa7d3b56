"""A run folder of somebody else: what it holds is shown, and does nothing to a page or terminal."""

import json
import unicodedata

import pytest

from moe_upgrpo.compare.report import write_report as write_comparison
from moe_upgrpo.report import write_report
from moe_upgrpo.store import read_config, read_metrics
from moe_upgrpo.store.text import printable
from tests.compare import made
from tests.report.synthetic import make_run

BAD = "a\0b\x1b[31mc\x07\x9b\x7f\u202e\ud800"
SHOWN = "a␀b␛[31mc␇�␡��"


def assert_clean(text: str) -> None:
    found = {c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"}
    assert not found and "\u202e" not in text


def texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def test_control_characters_have_signs():
    assert printable(BAD) == SHOWN
    assert printable({BAD: [BAD, 1, None, "ä\n\t"]}) == {SHOWN: [SHOWN, 1, None, "ä\n\t"]}


@pytest.mark.fault(
    "Servers and other people's files",
    "NUL and escape bytes in a run folder",
    "shown as signs in the report",
)
def test_nul_and_escapes_of_a_run_do_not_reach_the_report(tmp_path):
    run = make_run(tmp_path / "a\x1b[2Jrun", steps=3)
    config = read_config(run) | {"loss": BAD, BAD: BAD, "alarms": {BAD: BAD}}
    (run / "config.json").write_text(json.dumps(config))
    environment = json.loads((run / "env.json").read_text()) | {"argv": [BAD], BAD: 1}
    (run / "env.json").write_text(json.dumps(environment))
    rows = [row | {BAD: 1.0, "alarms": [BAD]} for row in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run], tmp_path / "report.html")
    html = page.read_text(encoding="utf-8")
    assert "␀" in html and "a␛[2Jrun" in html
    assert_clean(html)
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    found = list(texts(data))
    assert any(SHOWN in text for text in found)
    for text in found:
        assert_clean(text)


def test_those_of_a_crashed_run_do_not_reach_the_comparison(tmp_path):
    runs = [
        made.run(arm, seed, rows=made.accuracies(0.1, 0.2, 0.3), message=message, status=status)
        for arm, message, status in (("a", "", "finished"), ("b", BAD, "crashed"))
        for seed in range(4)
    ]
    folder = made.folder(tmp_path / "compared", runs, made.PLAN | {"question": BAD})
    page = write_comparison(folder).read_text(encoding="utf-8")
    assert SHOWN in page
    assert_clean(page)
    for text in texts(json.loads((folder / "report.json").read_text())):
        assert_clean(text)


@pytest.mark.parametrize("text", ["", "plain", "two\nlines\tand ä ☃"])
def test_other_text_stays(text):
    assert printable(text) == text
