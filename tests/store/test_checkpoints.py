"""Checkpoints on disk: whole or not there, pruned last, and what is wrong with them in words.

That a job killed at any of these moments can be resumed: tests/train/test_resume.py.
"""

import json
import os

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.checkpoints import Checkpoints, describe, faults, names, read_manifest


def commit(checkpoints: Checkpoints, step: int):
    part = checkpoints.begin(step)
    (part / "weights").write_bytes(bytes([step % 256]) * 100)
    (part / "rollouts").mkdir()
    (part / "rollouts" / "rank-0").write_bytes(b"abc")
    return checkpoints.commit(part, step, describe(part, names(part)), {"model": {"layers": 2}})


def test_a_checkpoint_is_whole_by_its_name_and_tells_its_files(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.all() == []
    path = commit(checkpoints, 20)
    assert checkpoints.all() == [path] and path.name == "state-000020"
    manifest = read_manifest(path)
    assert (manifest["version"], manifest["step"], manifest["model"]) == (1, 20, {"layers": 2})
    # sha256 of b"abc": FIPS 180-2, appendix B.1
    assert manifest["files"]["rollouts/rank-0"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert sorted(manifest["files"]) == names(path) == ["rollouts/rank-0", "weights"]
    assert faults(path, manifest["files"]) == []
    # A file that was described as it was written is not read again.
    known = {"weights": {"bytes": 100, "sha256": "told"}}
    assert describe(path, ["rollouts/rank-0"], known) == manifest["files"] | known


def test_the_oldest_goes_once_the_newest_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 10):
        commit(checkpoints, step)
    part = checkpoints.begin(12)
    assert [path.name for path in checkpoints.all()] == [f"state-{s:06d}" for s in (2, 4, 10)]
    checkpoints.commit(part, 12, {}, {})
    checkpoints.prune(keep=2)
    assert sorted(os.listdir(tmp_path)) == ["state-000010", "state-000012"]
    checkpoints.prune(keep=2)
    assert len(checkpoints.all()) == 2


def test_what_is_being_pruned_has_lost_its_name_before_its_files(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 1)
    commit(checkpoints, 2)

    def killed(path):
        (path / "weights").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moe_upgrpo.store.checkpoints.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.prune(keep=1)
    assert [path.name for path in checkpoints.all()] == ["state-000002"]
    checkpoints.begin(3)
    assert sorted(os.listdir(tmp_path)) == [".state-000003", "state-000002"]


@pytest.mark.fault(
    "Run folders",
    "a damaged state",
    "the file is named, and the way out",
)
def test_damage_is_named_with_the_file_and_the_way_out(tmp_path):
    path = commit(Checkpoints(tmp_path), 3)
    files = read_manifest(path)["files"]
    way_out = f"Delete {path} to resume from the checkpoint before it"
    (path / "weights").write_bytes(bytes([3]) * 99)
    (wrong,) = faults(path, files)
    assert "weights has 99 bytes, 100 were written" in wrong and way_out in wrong
    (path / "weights").write_bytes(bytes([3]) * 99 + b"x")
    (wrong,) = faults(path, files)
    assert "weights holds other bytes than were written" in wrong and way_out in wrong
    (path / "weights").unlink()
    (wrong,) = faults(path, files)
    assert "weights is missing" in wrong and way_out in wrong


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"version": 1}', "[" * 100_000], ids=lambda t: str(t)[:9]
)
def test_a_manifest_that_says_nothing(text, tmp_path):
    path = commit(Checkpoints(tmp_path), 3)
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"no readable manifest\.json: the checkpoint is damaged"):
        read_manifest(path)


def test_a_checkpoint_of_a_newer_version(tmp_path):
    path = commit(Checkpoints(tmp_path), 3)
    newer = read_manifest(path) | {"version": 2, "moe_upgrpo": "9.1"}
    (path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"version 2, written by a newer.*reads version 1.*9\.1"):
        read_manifest(path)


@pytest.mark.fault(
    "Run folders",
    "copies and hidden folders beside the states",
    "neither taken for a state nor deleted",
)
def test_names_that_are_nearly_ours_are_left_alone(tmp_path):
    """A copy was once taken for the newest state, and a hidden folder of the user's deleted."""
    checkpoints = Checkpoints(tmp_path)
    whole = [commit(checkpoints, step) for step in (4, 8)]
    others = [
        "state-backup",
        "state-000009.bak",
        "state-0000010",
        "state-00011",
        "state-０００００9",
    ]
    others += [".state-backup", ".keep", ".step-000008", ".state-00001", "step-000008"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "state-000099").write_text("a file")
    for name in (".state-000009", ".state-1000000", ".step-000008.part"):  # killed in between
        (tmp_path / name).mkdir()
    assert checkpoints.all() == whole
    checkpoints.commit(checkpoints.begin(12), 12, {}, {"model": {}})
    checkpoints.prune(keep=2)
    ours = ["state-000008", "state-000012", "state-000099"]
    assert sorted(os.listdir(tmp_path)) == sorted(others + ours)


@pytest.mark.fault(
    "Run folders",
    "step 1,000,000",
    "its state is the newest",
)
def test_steps_of_seven_digits_come_after_those_of_six(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (999_999, 1_000_000, 2_000_000):
        checkpoints.commit(checkpoints.begin(step), step, {}, {"model": {}})
    names_found = [path.name for path in checkpoints.all()]
    assert names_found == ["state-999999", "state-1000000", "state-2000000"]
    assert read_manifest(checkpoints.all()[-1])["step"] == 2_000_000
    checkpoints.prune(keep=1)
    assert [path.name for path in checkpoints.all()] == ["state-2000000"]


@pytest.mark.fault(
    "Run folders",
    "a state's folder that was renamed",
    "refused: its manifest says another step",
)
@pytest.mark.parametrize("step", [3, "5", None, True])
def test_a_manifest_of_another_step_than_its_folder_is_refused(step, tmp_path):
    path = commit(Checkpoints(tmp_path), 5)
    (path / "manifest.json").write_text(json.dumps(read_manifest(path) | {"step": step}))
    with pytest.raises(UserError, match=f"state-000005 holds the state after step {step}"):
        read_manifest(path)
