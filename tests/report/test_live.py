"""A followed run: its page is served, renewed as steps arrive, and ends with the run."""

import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.report import live, plots
from moe_upgrpo.store import RunFolder
from tests import browser


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(live, "POLL_S", 0.02)
    monkeypatch.setattr(live, "LINGER_S", 0.0)
    monkeypatch.setattr(live, "IDLE_SHARE", 0.0)
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])


@pytest.fixture
def writer(tmp_path):
    """A run folder and a process that holds its lock, until `end` ends it as no process wants to
    end."""
    run = RunFolder.create(tmp_path / "run", {"steps": 100})
    ready, done = os.pipe()
    child = os.fork()
    if not child:
        with run.locked():
            os.write(done, b"x")
            time.sleep(300)
        os._exit(0)
    os.read(ready, 1)

    def end():
        nonlocal child
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            child = 0

    yield run, end
    end()


def followed(run, **options):
    """Follow in a thread; the address and the thread."""
    said, started = [], threading.Event()

    def say(line):
        said.append(line)
        started.set()

    thread = threading.Thread(
        target=live.follow, args=(run.path, run.report_path), kwargs={"say": say} | options
    )
    thread.start()
    assert started.wait(30)
    return said[0].split()[0], thread, said


def get(url, host=None):
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_page_is_renewed_and_ends_with_its_run(writer, quick):
    run, end = writer
    url, thread, said = followed(run)
    try:
        until(lambda: "no step was finished" in get(url))
        with urllib.request.urlopen(url, timeout=10) as answer:
            policy, html = answer.headers["Content-Security-Policy"], answer.read().decode()
        (nonce,) = re.findall('<script nonce="(.*?)">', html)
        assert f"script-src 'nonce-{nonce}';" in policy
        run.append_metrics({"step": 1, "reward/mean": 0.25, "alarms": ["hot"]})
        until(lambda: "<b>hot</b>, 1 time, at step 1." in get(url))
        first = json.loads(get(f"{url}version"))
        run.append_metrics({"step": 2, "reward/mean": 0.5, "alarms": ["hot"]})
        until(lambda: "<b>hot</b>, 2 times, at steps 1 to 2." in get(url))
        assert json.loads(get(f"{url}version"))["version"] > first["version"]
        assert not first["ended"] and thread.is_alive()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(url, host="elsewhere.example:80")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{url}config.json")
        # Without the key of the address nobody reads the run, other users of the machine included.
        port, key = re.fullmatch(r"http://127.0.0.1:(\d+)/(.{20,})/", url).groups()
        for path in ("", "version", f"{key[:-1]}/", "a/version"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(f"http://127.0.0.1:{port}/{path}")
    finally:
        end()
    thread.join(30)
    assert not thread.is_alive() and said[-1] == f"the run has ended; report: {run.report_path}"
    # The file is a report as ever, without what renews it.
    assert "<script" not in run.report_path.read_text()


def test_token_rows_that_come_after_their_metrics_are_seen(writer):
    run, _ = writer
    run.append_metrics({"step": 1})
    before = live._state(run.path)
    assert live._state(run.path) == before
    (run.tokens / "step-000001-rank-0000.parquet").touch()
    assert live._state(run.path) != before


def test_when_a_run_has_ended(writer, tmp_path):
    run, end = writer
    assert not live.has_ended(run.path)
    end()
    assert live.has_ended(run.path)
    older = RunFolder.create(tmp_path / "older", {"steps": 2})
    assert not live.has_ended(older.path)
    older.append_metrics({"step": 1})
    assert not live.has_ended(older.path)
    older.append_metrics({"step": 2})
    assert live.has_ended(older.path)
    probe = RunFolder.create(tmp_path / "probe", {"loss": "none (probe)"})
    probe.append_metrics({"step": 1})
    assert live.has_ended(probe.path)


def test_what_cannot_be_followed_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not a run folder") as error:
        live.follow(tmp_path, tmp_path / "report.html")
    assert "\n" not in str(error.value)
    run = RunFolder.create(tmp_path / "run", {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be taken .*--port") as error:
            live.follow(run.path, run.report_path, port=port)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="from 0 to 65535"):
        live.follow(run.path, run.report_path, port=99_999)


@pytest.mark.slow
@pytest.mark.skipif(not browser.find(), reason="no browser: Chromium, or MOE_UPGRPO_BROWSER")
def test_a_browser_shows_steps_as_they_arrive(writer, monkeypatch):
    monkeypatch.setattr(live, "POLL_S", 0.1)
    monkeypatch.setattr(live, "IDLE_SHARE", 0.0)
    monkeypatch.setattr(live, "LINGER_S", 8.0)
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])
    run, end = writer
    url, thread, _ = followed(run)
    try:
        with browser.opened() as page:
            page.open(url)
            text = "document.body.innerText"
            page.until(f"{text}.includes('no step was finished')")
            run.append_metrics({"step": 1, "reward/mean": 0.25, "alarms": ["hot"]})
            page.until(f"{text}.includes('hot, 1 time, at step 1.')")
            # Alarms first, and what was opened stays open.
            top = "document.querySelector('{}').getBoundingClientRect().top"
            assert page.run(f"{top.format('.alarms')} < {top.format('.answer')}")
            page.run("document.querySelector('#reward details').open = true")
            run.append_metrics({"step": 2, "reward/mean": 0.5, "alarms": ["hot"]})
            page.until(f"{text}.includes('hot, 2 times, at steps 1 to 2.')")
            assert page.run("document.querySelector('#reward details').open")
            end()
            page.until("document.querySelector('#live').innerText.includes('has ended')")
    finally:
        end()
        thread.join(60)
