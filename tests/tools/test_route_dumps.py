"""Route dumps as people write them, and files that are broken, boastful or hostile."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import read_metrics
from moe_upgrpo.tools.route_dumps import read_routes
from tests.ranks import run_command

ROUTES = np.arange(24).reshape(3, 4, 2).astype(np.int16)


def written(write, value) -> bytes:
    buffer = io.BytesIO()
    write(buffer, value)
    return buffer.getvalue()


def npy(array) -> bytes:
    return written(lambda f, a: np.lib.format.write_array(f, a, allow_pickle=True), array)


def npz(**arrays) -> bytes:
    return written(lambda f, a: np.savez_compressed(f, **a), arrays)


def of_torch(value, **how) -> bytes:
    return written(lambda f, v: torch.save(v, f, **how), value)


TENSOR = torch.from_numpy(ROUTES)
OLD = {"_use_new_zipfile_serialization": False}
READ = {
    "npy": npy(ROUTES),
    "npy, Fortran order": npy(np.asfortranarray(ROUTES)),
    "npy, other byte order": npy(ROUTES.astype(">i4")),
    "npy, version 3": written(lambda f, a: np.lib.format.write_array(f, a, version=(3, 0)), ROUTES),
    "npz of one": npz(anything=ROUTES),
    "npz of several": npz(mask=np.ones(3), routes=ROUTES),
    "torch": of_torch(TENSOR),
    "torch, a view": of_torch(torch.cat([TENSOR, TENSOR])[3:]),
    "torch, layer-major": of_torch(TENSOR.transpose(0, 1).contiguous().transpose(0, 1)),
    "torch, old format": of_torch(TENSOR, **OLD),
    "torch, one of several": of_torch({"prompts": ["a"], "routes": TENSOR}),
    "torch, one in a dict": of_torch({"experts": TENSOR.long()}),
}


@pytest.mark.parametrize("suffix", [".npy", ".pt", ""])
@pytest.mark.parametrize("kind", READ)
def test_read(kind, suffix, tmp_path):
    """By what is in it, whatever its name."""
    path = tmp_path / f"dump{suffix}"
    path.write_bytes(READ[kind])
    assert np.array_equal(read_routes(path), ROUTES)


def claiming(shape, dtype="<i8", data=b"\x01" * 64) -> bytes:
    """An .npy whose header speaks of `shape`."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    return written(np.lib.format.write_array_header_1_0, header) + data


def zipped(**members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


class Code:
    """Unpickled by anything but a restricted reader, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


REFUSED = {
    "empty": (b"", "it is empty"),
    "text": (b"0 1 2 3\n", "no known kind"),
    "npy cut in its magic": (npy(ROUTES)[:7], "EOF|magic"),
    "npy cut in its header": (npy(ROUTES)[:60], "EOF"),
    "npy cut in its data": (npy(ROUTES)[:-1], "mmap length is greater"),
    "npy of terabytes": (claiming((1 << 40, 64, 8)), "mmap length|too big"),
    "npy of more than fits 64 bits": (claiming((1 << 62, 64, 8)), "."),
    "npy of a shape that wraps to nothing": (claiming((1 << 32, 1 << 32, 8)), "."),
    "npy of a negative shape": (claiming((-1, 4, 8)), "."),
    "npy with a header of nothing but brackets": (
        b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000,
        ".",
    ),
    "npy with a header of megabytes": (
        b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little") + b" " * (1 << 20),
        "EOF|large",
    ),
    "npy of floats": (npy(ROUTES / 1), "it holds float64"),
    "npy of bools": (npy(ROUTES > 3), "it holds bool"),
    "npy of objects": (npy(np.array([Code()], object)), "pickle|Object|object"),
    "npy of text": (npy(np.array(["0"])), "it holds <U1"),
    "npz of none": (zipped(), "it holds nothing; one array"),
    "npz of two": (npz(a=ROUTES, b=ROUTES), "it holds a, b; one array, or one called 'routes'"),
    "npz cut short": (npz(a=ROUTES)[:-30], "zip"),
    "npz of terabytes": (zipped(routes=claiming((1 << 40, 64, 8))), "EOF|allocate|too big"),
    "npz of objects": (npz(routes=np.array([Code()], object)), "pickle|Object|object"),
    "zip of something else": (zipped(routes=b"hello"), "."),
    "torch cut short": (of_torch(TENSOR)[:-30], "."),
    "torch, old format, cut short": (of_torch(TENSOR, **OLD)[:-30], "."),
    "torch of floats": (of_torch(TENSOR.float()), "it holds torch.float32"),
    "torch of bfloat16": (of_torch(TENSOR.bfloat16()), "it holds torch.bfloat16"),
    "torch of two": (of_torch({"a": TENSOR, "b": TENSOR}), "it holds a, b; one array"),
    "torch of a list": (of_torch([TENSOR]), "it holds list, no array"),
    "torch of terabytes": (of_torch(torch.ones(1, 1, 8).short().expand(1 << 40, 4, 8)), "claimed"),
    "torch without data": (of_torch(torch.empty(1 << 40, 4, 8, device="meta")), "without plain"),
    "torch, sparse": (of_torch(TENSOR.to_sparse()), "without plain data"),
    "torch with code": (of_torch(Code()), "."),
    "torch with code, old format": (of_torch({"routes": Code()}, **OLD), "."),
    "a pickle": (pickle.dumps(Code()), "."),
}


@pytest.mark.fault(
    "Problems and routes",
    "route dumps that are empty, archives or have huge headers",
    "read, or refused in one line",
)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    data, words = REFUSED[kind]
    path = tmp_path / "dump"
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=rf"/dump cannot be read as expert ids: .*({words})"
    ) as error:
        read_routes(path)
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    assert said.endswith("of integers [tokens, layers, top-k] or [sequences, tokens, layers, "
                         "top-k] is needed.")  # fmt: skip
    assert not (tmp_path / "ran").exists() and not recwarn.list


def test_no_file(tmp_path):
    for path, words in ((tmp_path / "absent", "No such file"), (tmp_path, "it is no file")):
        with pytest.raises(UserError, match=words):
            read_routes(path)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["npy", "npz of one", "torch", "torch, old format"]), st.data())
def test_damage_is_one_message_or_an_array_of_integers(tmp_path, kind, data):
    """Bytes changed or cut off anywhere: nothing but UserError is ever raised."""
    bad = bytearray(READ[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "dump"
    path.write_bytes(bytes(bad[: data.draw(st.integers(0, len(bad)))]))
    try:
        assert read_routes(path).dtype.kind in "iu"
    except UserError as error:
        assert "\n" not in str(error)


def test_the_command_takes_a_padded_batch_and_says_one_line(tmp_path):
    """Two sequences of five tokens as a torch file and an .npz: one of 40 slots differs."""
    rollout = torch.tensor([0, 1]).expand(2, 5, 2, 2).clone()
    train = rollout.numpy().copy()
    train[1, 4, 0] = (1, 2)
    torch.save(rollout, tmp_path / "rollout.pt")
    np.savez(tmp_path / "train.npz", train)
    names = ("--rollout-routes", tmp_path / "rollout.pt", "--train-routes", tmp_path / "train.npz")
    result = run_command("probe", *names, "--num-experts", 4, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (row,) = read_metrics(tmp_path / "out")
    assert row["mismatch/router_rate"] == 1 / 20 and row["mismatch/slot_rate"] == 1 / 40
    assert row["mismatch/by_layer"] == [0.1, 0.0]

    (tmp_path / "train.npz").write_bytes(b"")
    result = run_command("probe", *names, "--num-experts", 4, "--output-dir", tmp_path / "again")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "train.npz cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1 and "it is empty" in result.stderr
