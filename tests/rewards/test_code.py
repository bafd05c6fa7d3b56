"""Programs run against unit tests, and what they cannot do meanwhile."""

import ctypes
import json
from types import SimpleNamespace

import pytest

from moe_upgrpo.rewards import Question, sandbox
from moe_upgrpo.rewards import code as code_module
from moe_upgrpo.rewards.code import Case, code, passes, read_tests, written

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
LANDLOCK = sandbox.SUPPORTED and ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1
linux = pytest.mark.skipif(not LANDLOCK, reason="seccomp and Landlock of Linux on x86_64")


def asked(answer, prompt=""):
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return Question(prompt=prompt, answer=answer)


@linux
def test_programs_against_their_tests():
    assert code(asked(["assert add(1, 2) == 3"]), ADD, {}) == 1
    assert code(asked(["assert add(1, 2) == 4"]), ADD, {}) == 0
    pairs = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3 \n", "7"]}
    reads = "a, b = map(int, input().split())\nprint(a + b)"
    assert code(asked(pairs), reads, {}) == 1
    one = {"inputs": ["1 2"], "outputs": ["3"]}
    for source in ("sys.stdin.buffer.read()", "open(0).read()"):
        summed = f"import sys\nprint(sum(map(int, {source}.split())))"
        assert code(asked(one), summed, {}) == 1
    assert code(asked(pairs | {"outputs": ["3", "8"]}), reads, {}) == 0


@linux
def test_of_functions_by_name():
    pairs = {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}
    method = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert code(asked(pairs), method, {}) == 1
    assert code(asked(pairs | {"outputs": [[3, 4]]}), method, {}) == 0


REFUSED = """
import ctypes, os, resource, socket, subprocess
attempts = {
    "socket": lambda: socket.socket(),
    "fork": os.fork,
    "process": lambda: subprocess.run(["true"]),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "signal": lambda: os.kill(os.getppid(), 0),
    "all signals": lambda: os.kill(-1, 0),
    "write": lambda: open(FILE, "a"),
    "truncate": lambda: os.truncate(FILE, 0),
    "remove": lambda: os.remove(FILE),
    "rename": lambda: os.rename(FILE, "here"),
    "chmod": lambda: os.chmod(FILE, 0),
    "limits": lambda: resource.setrlimit(resource.RLIMIT_CPU, (100, 100)),
    "its parent's memory": lambda: open(f"/proc/{os.getppid()}/mem", "wb"),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        if error.errno not in (1, 13, 18):  # not permitted, denied, another device
            raise
    except ValueError:  # setrlimit's own word for it
        pass
    else:
        raise SystemExit(name)
libc = ctypes.CDLL(None)
assert libc.syscall(41, 2, 1, 0) == -1 and libc.syscall(425, 1, None) == -1
assert libc.syscall(41 | 0x40000000, 2, 1, 0) == -1
"""
# Ways round what is refused above; each must raise or give -1.
WAYS_ROUND = """
import ctypes, fcntl, os, struct
libc = ctypes.CDLL(None)
attempts = {
    "a signal by a pipe's owner": lambda: fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getppid()),
    "any signal so": lambda: fcntl.fcntl(pipe, 10, 9),
    "typing into the terminal": lambda: fcntl.ioctl(pipe, 0x5412, b"x"),
    "attributes": lambda: fcntl.ioctl(os.open(FILE, 0), 0x40086602, struct.pack("l", 0x40)),
    "the terminal": lambda: os.open("/dev/tty", os.O_RDONLY),
    "times": lambda: os.utime(FILE, (5, 5)),
    "emptied as it is read": lambda: os.open(FILE, os.O_RDONLY | os.O_TRUNC),
    "emptied as it is opened for nothing": lambda: os.open(FILE, os.O_TRUNC | 3),
    "emptied by its name": lambda: os.truncate(FILE, 0),
    "emptied by openat2": lambda: libc.syscall(437, -100, FILE.encode(), HOW, 24),
    "shared memory": lambda: libc.shmget(0x6D6F65, 4096, 0o1600),
    "a message queue": lambda: libc.msgget(0x6D6F65, 0o1600),
    "semaphores": lambda: libc.semget(0x6D6F65, 1, 0o1600),
    "its parent's scheduling": lambda: libc.syscall(314, os.getppid(), IDLE, 0),
    "its parent's disk": lambda: libc.syscall(251, 1, os.getppid(), 3 << 13),
    "to outlive its parent": lambda: libc.prctl(1, 0, 0, 0, 0),
}
HOW = struct.pack("QQQ", os.O_TRUNC, 0, 0)
IDLE = struct.pack("IIQiIQQQ", 48, 5, 0, 0, 0, 0, 0, 0)
pipe = os.pipe()[0]
done = []
for name, attempt in attempts.items():
    try:
        if attempt() != -1:
            done.append(name)
    except OSError:
        pass
print(done)
"""
ALLOWED = """
import asyncio, threading
thread = threading.Thread(target=len, args=("",))
thread.start()
thread.join()
open("mine", "w").write("a")
assert open("mine").read() == "a"
async def one(): return 1
assert asyncio.run(one()) == 1
"""


@linux
def test_what_a_program_may_and_may_not(tmp_path):
    file = tmp_path / "kept"
    file.write_text("kept")
    assert passes(f"FILE = {str(file)!r}\n{REFUSED}\n{ALLOWED}", Case())
    assert file.read_text() == "kept" and file.stat().st_mode & 0o400


@linux
def test_ways_round_are_refused_with_an_older_landlock_too(tmp_path, monkeypatch):
    file = tmp_path / "kept"
    file.write_text("kept")
    times = file.stat().st_mtime_ns
    nothing = Case(printed="[]")
    assert passes(f"FILE = {str(file)!r}\n{WAYS_ROUND}", nothing)
    text, since_6_2 = code_module._SANDBOX.read_text(), ", 3: 0x4000"
    assert since_6_2 in text
    (tmp_path / "sandbox.py").write_text(text.replace(since_6_2, ""))
    monkeypatch.setattr(code_module, "_SANDBOX", tmp_path / "sandbox.py")
    assert passes(f"FILE = {str(file)!r}\n{WAYS_ROUND}", nothing)
    assert file.read_text() == "kept" and file.stat().st_mtime_ns == times


@linux
def test_ends_that_are_no_success():
    for program in ("raise SystemExit(0)", "import os\nos._exit(0)", "x = bytearray(2**31)"):
        assert not passes(program, Case(test="assert True")), program


@linux
@pytest.mark.slow
def test_time_and_files_are_limited(monkeypatch):
    monkeypatch.setattr(code_module, "WALL_S", 3.0)
    large = "open('a', 'w').write('a' * 2**25)"
    for program in ("while True: pass", "import time\ntime.sleep(60)", large):
        assert not passes(program, Case()), program


@linux
def test_where_programs_cannot_be_shut_in_they_are_not_run(tmp_path, monkeypatch):
    text = code_module._SANDBOX.read_text()
    told = "_NO_NEW_PRIVS, 1, 0, 0, 0"
    assert told in text
    text = text.replace(told, "_NO_NEW_PRIVS, 99, 0, 0, 0")
    (tmp_path / "sandbox.py").write_text(text)
    monkeypatch.setattr(code_module, "_SANDBOX", tmp_path / "sandbox.py")
    with pytest.raises(
        RuntimeError, match=r"cannot be shut in here, and are not run: .*no_new_priv"
    ):
        passes(f"open({str(tmp_path / 'ran')!r}, 'w')", Case())
    assert not (tmp_path / "ran").exists()


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(code_module, "sandbox", SimpleNamespace(SUPPORTED=False))
    with pytest.raises(RuntimeError, match="Linux on x86_64 only"):
        code(asked(["assert True"]), ADD, {})


def test_which_program_and_which_tests():
    assert written("```\n1\n```\n```python\n2\n```\n```text\n3\n```") == "2\n"
    assert written("```\n1\n```") == "1\n" and written("4") == "4"
    mbpp = {"test_list": ["assert f() == 1"], "test_imports": ["import math"]}
    assert read_tests(asked("def f(): return 1"), mbpp, "x")[1] == [
        Case(test="import math\nassert f() == 1")
    ]
    row = {"test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    program, (case,) = read_tests(asked("x", prompt="def f():\n"), row, "    return 1")
    assert program == "def f():\n    return 1" and case.test.endswith("check(f)")
    assert read_tests(asked("x"), row, "def f(): return 1")[0] == "def f(): return 1"
    for answer in ("", "[]", {"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}):
        with pytest.raises(ValueError, match="code: "):
            read_tests(asked(answer), {}, "x")
