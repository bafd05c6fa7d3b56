"""Keys of engine servers: sent with every request, in no command line, and what a refusal says.

The servers are stand-ins that answer 401 to a request without their key, and else as vLLM 0.32 and
SGLang 0.5.23 do; the real ones, with keys, are in tests/engines.
"""

import asyncio
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.rollout import SamplingConfig, sglang_server
from moe_upgrpo.rollout.sglang import SGLangEngine
from moe_upgrpo.rollout.vllm_guard import RequireKey
from moe_upgrpo.rollout.vllm_server import VLLMServerEngine
from tests.ranks import run_ranks
from tests.rollout.stand_ins import KEY, server, sglang, vllm

ROOT = Path(__file__).parents[2]


ENGINES = {
    "vllm": (vllm, VLLMServerEngine, "VLLM_API_KEY"),
    "sglang": (sglang, SGLangEngine, "SGLANG_API_KEY"),
}


@pytest.fixture(params=ENGINES)
def kind(request, monkeypatch):
    made = ENGINES[request.param]
    for _, _, variable in ENGINES.values():
        monkeypatch.delenv(variable, raising=False)
    return made


def sampled(engine):
    (rollout,) = engine.generate(
        [np.array([1, 2])], SamplingConfig(max_new_tokens=3), samples_per_prompt=1, seed=0
    )
    return rollout.response_ids.tolist()


@pytest.mark.fault(
    "Servers and other people's files",
    "another user of the machine asks an engine's server",
    "401: the trainer alone has its key, on every request",
)
@pytest.mark.parametrize("by", ["variable", "argument"])
def test_every_request_carries_the_key(by, kind, tiny_checkpoint, monkeypatch):
    stand_in, engine_of, variable = kind
    given = {"api_key": KEY}
    if by == "variable":
        monkeypatch.setenv(variable, KEY)
        given = {}
    with server(stand_in(tiny_checkpoint)) as (url, asked):
        engine = engine_of(tiny_checkpoint, dtype="float32", url=url, **given)
        assert len(sampled(engine)) == 3 and engine.health()
        engine.close()
    assert len(asked) >= 4 and {found for _, found in asked} == {f"Bearer {KEY}"}


@pytest.mark.fault(
    "Servers and other people's files",
    "a server that asks for another key, or for one that was not given",
    "one message that names the variable, status 2",
)
@pytest.mark.parametrize("key", [None, "another"])
def test_a_refused_key_is_one_message(key, kind, tiny_checkpoint):
    stand_in, engine_of, variable = kind
    what = "another key than it was given" if key else "a key, and got none"
    with server(stand_in(tiny_checkpoint)) as (url, asked), pytest.raises(UserError) as told:
        engine_of(tiny_checkpoint, dtype="float32", url=url, api_key=key)
    assert told.value.status == 2 and "\n" not in str(told.value)
    assert f"{url} asks for {what}: set {variable}" in str(told.value)
    assert "another" not in str(told.value).replace("another key than", "")  # nor the key itself
    first = {"/server_info", "/pause_generation"}
    assert {path for path, _ in asked} <= first | {"/continue_generation"}


@pytest.mark.parametrize("key", ["", " x", "x\n", "a\r\nHost: b", "schlüssel"])
def test_a_key_that_cannot_be_sent(key, kind, tiny_checkpoint):
    _, engine_of, variable = kind
    with pytest.raises(UserError, match=f"key .{variable}. is empty or has characters"):
        engine_of(tiny_checkpoint, dtype="float32", url="http://127.0.0.1:9", api_key=key)


def shared(model_dir, url):
    """Rank 0 alone knows the key."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        os.environ["SGLANG_API_KEY"] = os.environ["VLLM_API_KEY"] = KEY
    made = [
        lambda: SGLangEngine.shared(model_dir, "float32", url=url),
        lambda: VLLMServerEngine(model_dir, url, "float32"),
    ]
    return [engine()._key for engine in made]


def test_ranks_have_the_key_of_rank_0(tiny_checkpoint, monkeypatch):
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    of_vllm, of_sglang = vllm(tiny_checkpoint), sglang(tiny_checkpoint)
    both = lambda path, body: of_vllm(path, body) | as_object(of_sglang(path, body))  # noqa: E731
    with server(both) as (url, asked):
        assert run_ranks(2, shared, tiny_checkpoint, url) == [[KEY, KEY]] * 2
    assert {found for _, found in asked} == {f"Bearer {KEY}"}


def as_object(found):
    return found if isinstance(found, dict) else {}


@pytest.mark.fault(
    "Servers and other people's files",
    "a server is started",
    "on 127.0.0.1, with a key that no command line and no log shows",
)
def test_a_started_server_has_a_key_of_its_own_on_loopback(tiny_checkpoint, tmp_path, monkeypatch):
    """In its environment, and not on its command line."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nenv\n')
    python.chmod(0o755)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    found = []
    for name in ("a", "b", "given"):
        given = {"api_key": "of-my-own"} if name == "given" else {}
        with pytest.raises(MachineFault, match="ended with code 0 at its start") as told:
            SGLangEngine(tiny_checkpoint, python=python, log=tmp_path / name, **given)
        said = (tmp_path / name).read_text()
        command, key = said.splitlines()[0], re.search("^SGLANG_API_KEY=(.*)$", said, re.M)[1]
        assert "--host 127.0.0.1 " in command and key not in command and key not in str(told.value)
        found.append(key)
    assert found[2] == "of-my-own" and found[0] != found[1] and min(map(len, found[:2])) >= 40


def test_sglang_gets_the_key_and_logs_none(monkeypatch):
    """Stand-ins of the four functions of SGLang that are called on the way."""
    seen = {}

    class Args(dict):
        def resolved_dict(self):
            return dict(self)

    def prepare(arguments):
        (key,) = [word.partition("=")[2] for word in arguments if word.startswith("--api-key=")]
        return Args(api_key=key, host="127.0.0.1")

    def run(args):
        seen["served"] = args["api_key"]
        seen["logged"] = modules["sglang.srt.entrypoints.engine"]._server_args_for_logging(args)

    named = {
        "sglang": {},
        "sglang.launch_server": {"run_server": run},
        "sglang.srt": {},
        "sglang.srt.plugins": {"load_plugins": lambda: None},
        "sglang.srt.server_args": {"prepare_server_args": prepare},
        "sglang.srt.utils": {"kill_process_tree": lambda *_, **__: None},
        "sglang.srt.entrypoints": {},
        "sglang.srt.entrypoints.engine": {"_server_args_for_logging": lambda args: dict(args)},
    }
    modules = {}
    for name, values in named.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(values)
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["sglang.srt.entrypoints"].engine = modules["sglang.srt.entrypoints.engine"]
    monkeypatch.setenv("SGLANG_API_KEY", "-begins-with-a-dash")
    sglang_server.main(["--model-path", "m"])
    assert seen["served"] == "-begins-with-a-dash"
    assert seen["logged"] == {"api_key": "***", "host": "127.0.0.1"}


def asgi(path, key=None, kind="http"):
    """Ask the guard: what it lets through, and what it answers."""
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    header = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": kind, "path": path, "headers": header}
    asyncio.run(RequireKey(app)(scope, None, send))
    return passed, sent


@pytest.mark.fault(
    "Servers and other people's files",
    "vLLM's development endpoints, which its key leaves open",
    "the guard asks for the key on every path",
)
def test_the_guard_asks_on_every_path_of_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    for path in ("/collective_rpc", "/pause", "/server_info", "/v1/models", "/", "/healthy"):
        assert asgi(path, KEY) == ([path], [])
        for key in (None, "", "the-ke", "the-key2"):
            passed, sent = asgi(path, key)
            assert passed == [] and sent[0]["status"] == 401 and b"Unauthorized" in sent[1]["body"]
    assert asgi("/health") == (["/health"], [])
    closed = {"type": "websocket.close", "code": 1008}
    assert asgi("/v1/realtime", kind="websocket") == ([], [closed])
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        asgi("/health")


STARTS = re.compile(
    r"vllm serve |vllm\.entrypoints\.openai\.api_server"
    r"|-m sglang\.launch_server|sglang_server\.py --"
)


@pytest.mark.fault(
    "Servers and other people's files",
    "a documented command line",
    "has `--host 127.0.0.1`",
)
def test_every_server_that_is_started_or_documented_is_on_loopback():
    """Where a page or a script has a server's command line, the address is on it."""
    folders = ("docs", "examples", "benchmarks", "moe_upgrpo", "tests")
    files = [ROOT / "README.md", *(f for folder in folders for f in (ROOT / folder).rglob("*"))]
    texts = [f for f in files if f.suffix in (".md", ".py", ".sh", ".yaml") and f != Path(__file__)]
    found = 0
    for file in texts:
        text = file.read_text(encoding="utf-8")
        assert "0.0.0.0" not in text, file
        for match in STARTS.finditer(text):
            if "--model MODEL` is the same server" in text[match.start() : match.end() + 40]:
                continue  # another name for the line above it
            found += 1
            near = text[max(match.start() - 300, 0) : match.end() + 700]
            assert "--host 127.0.0.1" in near or '"--host", "127.0.0.1"' in near, (file, match)
    assert found >= 5
