"""The kernels that every way in pins: which, whether they are repeatable, and what is said of it.

Not covered: a real AMD CPU, and libraries other than MKL. MKL_ENABLE_INSTRUCTIONS=SSE4_2 makes MKL
choose by address on an Intel CPU too, and the tests that fail on AMD then fail here.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_upgrpo import kernels
from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.sglang_process import ServerProcess
from tests.ranks import run_command, run_ranks

CASCADE_LAKE = "fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512_vnni"
MKL = torch.backends.mkl.is_available()
PINNED = ("AVX512,STRICT", "AVX2", "AUTO,STRICT", "AUTO")  # AUTO: where AVX2 is not


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (CASCADE_LAKE, "AVX512,STRICT"),
        (f"{CASCADE_LAKE} avx512_bf16 amx_bf16", "AVX512,STRICT"),
        ("fma avx2", "AVX2"),  # Zen 2 and 3, Haswell
        ("fma avx2 avx512f avx512cd avx512er avx512pf", "AVX2"),  # Knights Landing
        ("sse4_2", "AVX2"),  # MKL takes AUTO instead
        ("", "AVX2"),
    ],
)
def test_the_value_for_a_cpu(instructions, expected):
    assert kernels.repeatable(frozenset(instructions.split())) == expected


def at(x: torch.Tensor, floats: int) -> torch.Tensor:
    """A copy that begins `floats` floats behind a multiple of 64 bytes."""
    room = torch.empty(x.numel() + 32)
    begin = -room.data_ptr() // 4 % 16 + floats
    copy = room[begin : begin + x.numel()].view(x.shape).copy_(x)
    assert copy.data_ptr() % 64 == 4 * floats
    return copy


def changed_by_address(environment: dict[str, str] | None = None) -> tuple[int, int]:
    """Products of the same numbers at other addresses that differ in a bit; products tried."""
    os.environ |= environment or {}  # before MKL's first call in this process
    generator = torch.Generator().manual_seed(0)
    changed = tried = 0
    for m, k, n in ((1, 32, 32), (1, 64, 64), (3, 32, 16), (33, 64, 70), (17, 33, 31)):
        x, weight = (torch.randn(rows, k, generator=generator) for rows in (m, n))
        for product in (torch.nn.functional.linear, lambda x, w: w @ x[0], lambda x, w: w @ x.T):
            expected = product(x, weight)
            for i in range(16):
                for j in range(16):
                    changed += not torch.equal(product(at(x, i), at(weight, j)), expected)
                    tried += 1
    return changed, tried


@pytest.mark.bits
@pytest.mark.parametrize("limit", [{}, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}], ids=["own", "SSE4"])
def test_a_product_does_not_depend_on_the_addresses(limit):
    """Unpinned, 1,776 of the 3,840 change under SSE4 on an Intel CPU."""
    [(changed, tried)] = run_ranks(1, changed_by_address, limit)
    assert tried == 3840 and changed == 0


def test_an_import_changes_nothing_of_the_environment():
    code = (
        "import os; before = dict(os.environ); import moe_upgrpo.cli, moe_upgrpo.losses, "
        "moe_upgrpo.store, moe_upgrpo.kernels; print(dict(os.environ) == before)"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "OMP_NUM_THREADS")}
    result = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


def doctor() -> dict:
    result = run_command("doctor", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["cpu"]


def test_the_command_pins_what_the_user_left_open(monkeypatch):
    for name in ("MKL_CBWR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name)
    found = doctor()
    assert found["MKL_CBWR"] == kernels.repeatable(kernels._cpu()[1]) and found["threads"] == 1
    assert found["model"] and found["aten"] == torch.backends.cpu.get_cpu_capability()
    assert found["mkl"] in (PINNED if MKL else (None,))


def test_the_command_leaves_what_the_user_set(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = doctor()
    assert found["MKL_CBWR"] == "COMPATIBLE" and found["mkl"] == ("COMPATIBLE" if MKL else None)
    assert found["limits"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def pinned_late() -> dict:
    """As in a process of another library's that has computed already."""
    del os.environ["MKL_CBWR"]
    torch.randn(8, 8) @ torch.randn(8, 8)
    kernels.pin()
    return kernels.facts()


@pytest.mark.skipif(not MKL, reason="torch without MKL")
def test_a_pin_that_comes_too_late_is_told():
    [found] = run_ranks(1, pinned_late)
    assert found["MKL_CBWR"] in PINNED and found["mkl"] == "OFF"
    assert "not pinned: MKL_CBWR=" in kernels.describe(found)["MKL (fp32 products)"]
    assert "came after MKL's first call" in kernels.describe(found)["MKL (fp32 products)"]


FACTS = {
    "model": "A CPU",
    "instructions": ["avx2"],
    "MKL_CBWR": "AVX2",
    "mkl": "AVX2",
    "aten": "AVX2",
    "limits": {},
    "threads": 1,
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "pinned to AVX2"),
        ({"MKL_CBWR": "AVX2, STRICT", "mkl": "AVX2,STRICT"}, "pinned to AVX2,STRICT"),
        ({"MKL_CBWR": "avx2", "mkl": "AUTO"}, "pinned to AUTO: this CPU or this MKL does not have "
                                              "MKL_CBWR=avx2"),
        ({"MKL_CBWR": None, "mkl": "OFF"}, "not pinned: results may change with the address of an "
                                           "array; set MKL_CBWR"),
        ({"MKL_CBWR": "", "mkl": "OFF"}, "not pinned: results may change with the address of an "
                                         "array; set MKL_CBWR"),
        ({"mkl": None}, "cannot be asked (another BLAS, or a build that does not tell)"),
        ({"limits": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}}, "pinned to AVX2; at most AVX2"),
    ],
)  # fmt: skip
def test_what_is_said_of_mkl(changed, expected):
    assert kernels.describe(FACTS | changed)["MKL (fp32 products)"] == expected


def test_a_server_that_we_start_inherits_the_pin(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    server = ServerProcess(
        python, {}, log=tmp_path / "log", log_stays=True, key="k", start_timeout=30
    )
    with pytest.raises(UserError, match="ended with code 0"):
        server.start(tmp_path, "0")
    inherited = (tmp_path / "log").read_text().splitlines()
    assert f"MKL_CBWR={os.environ['MKL_CBWR']}" in inherited
    assert f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" in inherited
