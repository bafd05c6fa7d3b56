"""The HTTP client of engines' servers, against a real server of the standard library."""

import json
import socket
import threading
import time
from contextlib import closing

import pytest

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.rollout import server_client
from moe_upgrpo.rollout.server_client import ServerClient
from tests.rollout.local_server import serving


def client(url, **given):
    about = dict(key="the-key", key_variable="A_KEY", late="took over {timeout} s for {path}")
    return ServerClient("Server", url, **about | given)


def echo(request, body):
    """Tell what was asked."""
    told = [request.command, request.path, json.loads(body or b"null"), dict(request.headers)]
    return 200, json.dumps(told).encode()


def test_a_question_is_a_get_and_a_body_a_post_of_json_with_the_key():
    with serving(echo) as url:
        method, path, body, head = client(f"{url}/under/").call("/a?b=1", timeout=5)
        assert (method, path, body) == ("GET", "/under/a?b=1", None)
        assert head["Authorization"] == "Bearer the-key"
        method, path, body, head = client(url, key=None).call("/a", {"ü": [1, 2.5]}, timeout=5)
        assert (method, path, body) == ("POST", "/a", {"ü": [1, 2.5]})
        assert head["Content-Type"] == "application/json" and "Authorization" not in head
        assert client(url).call("/a", {}, timeout=5)[0] == "POST"  # an empty body is one


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(echo) as url:
        assert client(url).call("/a", timeout=5)[1] == "/a"


@pytest.mark.parametrize(
    ("status", "kind", "exit_status", "hint"),
    [
        (400, UserError, 2, False),
        (403, UserError, 2, True),
        (404, UserError, 2, True),
        (302, UserError, 2, False),
        (500, MachineFault, 4, False),
        (503, MachineFault, 4, False),
    ],
)
def test_a_refusal_is_one_error_with_what_the_server_said(status, kind, exit_status, hint):
    with serving(lambda *_: (status, b"no \xff such" + b"x" * 9999)) as url:
        with pytest.raises(UserError) as told:
            client(url, unknown="Start it anew.").call("/a", timeout=5)
        assert not client(url).is_alive(5)
    said = str(told.value)
    assert type(told.value) is kind and told.value.status == exit_status
    assert said.startswith(f"Server refused /a ({status}) at {url}: no \ufffd suchxxx")
    assert len(said) < 2200 and said.endswith("Start it anew.") == hint


def test_a_refused_key_names_its_variable_and_not_the_key():
    with serving(lambda *_: (401, b"{}")) as url:
        for key, what in (("the-key", "another key than it was given"), (None, "a key, and got")):
            with pytest.raises(UserError, match=f"Server at {url} asks for {what}") as told:
                client(url, key=key).call("/a", timeout=5)
            assert "set A_KEY" in str(told.value) and "the-key" not in str(told.value)


def test_an_answer_without_json_may_be_another_server():
    with serving(lambda *_: (200, b"<html>Welcome</html>")) as url:
        with pytest.raises(UserError, match=r"/a with no JSON: '<html>Welcome.*another server"):
            client(url).call("/a", timeout=5)
        assert client(url).is_alive(5)  # what it says there does not matter
    with serving(lambda *_: (200, b"")) as url:
        assert client(url).call("/a", timeout=5) is None


def test_a_server_that_is_gone_late_or_breaks_off_is_the_machines_fault():
    with serving(lambda *_: None) as url, pytest.raises(MachineFault, match="is not there") as told:
        client(url).call("/a", timeout=5)
    assert "RemoteDisconnected" in str(told.value) and str(told.value).endswith("See its log.")
    with pytest.raises(MachineFault, match=r"is not there .*refused.*its last words"):
        client(url, log=lambda: " its last words").call("/a", timeout=5)
    assert not client(url).is_alive(5)

    def half(request, _):
        request.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{}")

    with serving(half) as url, pytest.raises(MachineFault, match=r"not there.*IncompleteRead"):
        client(url).call("/a", timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        late = client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(MachineFault, match=r"took over 0\.2 s for /a: TimeoutError"):
            late.call("/a", timeout=0.2)
        assert not late.is_alive(0.2)
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "ftp://host:1", "http://", "http://host:port", "http://[::1"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="http://HOST:PORT is needed"):
        client(url)


NOBODY = client("http://127.0.0.1:9")


def all_of(ask, bodies, asker=NOBODY):
    with closing(asker.answers(ask, bodies, beat=5.0)) as arriving:
        return dict(filter(None, arriving))


def test_many_are_asked_at_once_and_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(server_client, "MAX_REQUESTS", 3)
    lock, together, now = threading.Lock(), threading.Barrier(3, timeout=30), []
    most = []

    def slow(request, body):
        with lock:
            now.append(body)
            most.append(len(now))
        together.wait()  # passes only where three are there at a time
        with lock:
            now.remove(body)
        return echo(request, body)

    with serving(slow) as url:
        asker = client(url)
        found = all_of(lambda b, opened: asker.call("/a", b, timeout=30, opened=opened), range(9))
    assert {i: answer[2] for i, answer in found.items()} == {i: i for i in range(9)}
    assert max(most) == 3 and all_of(None, []) == {}


def test_silence_is_told_every_beat():
    def slow(body, _):
        time.sleep(0.5)
        return body

    begin, beats = time.monotonic(), 0
    with closing(NOBODY.answers(slow, ["a"], beat=0.05)) as arriving:
        for arrived in arriving:
            beats += arrived is None
    assert arrived == (0, "a")
    assert 2 <= beats <= (time.monotonic() - begin) / 0.05


def test_a_failure_ends_all_and_cuts_what_is_open(monkeypatch):
    """One of three is refused while two wait: both are cut on the server, the rest never asked."""
    monkeypatch.setattr(server_client, "MAX_REQUESTS", 3)
    here, cut, asked = threading.Semaphore(0), threading.Semaphore(0), []

    def answer(request, body):
        asked.append(i := json.loads(body))
        if i == 2:
            assert here.acquire(timeout=30) and here.acquire(timeout=30)
            return 400, b"not this one"
        here.release()
        assert request.connection.recv(1) == b""  # until the client's side is closed
        cut.release()

    with serving(answer) as url:
        asker = client(url)
        with pytest.raises(UserError, match=r"refused /a \(400\).*not this one"):
            all_of(lambda b, opened: asker.call("/a", b, timeout=60, opened=opened), range(9))
        assert cut.acquire(timeout=30) and cut.acquire(timeout=30)
    assert sorted(asked) == [0, 1, 2]


def test_a_server_that_dies_is_one_fault_and_its_log_is_read_once():
    together, read = threading.Barrier(5, timeout=30), []

    def dies(*_):
        together.wait()

    def log():
        read.append("once")
        return " Its last words."

    with serving(dies) as url:
        asker = client(url, log=log)
        with pytest.raises(MachineFault, match=r"not there \(any more\): .*\. Its last words\.$"):
            all_of(lambda b, o: asker.call("/a", b, timeout=30, opened=o), range(5), asker)
    assert read == ["once"]


def test_a_fault_of_ours_in_a_thread_is_raised_too():
    with pytest.raises(ZeroDivisionError):
        all_of(lambda body, _: 1 // body, [1, 0])
