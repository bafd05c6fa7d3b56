"""Folders for weights on a local file system; NFS, which has no such locks, is not covered."""

import gc
import signal
import subprocess
import sys
from pathlib import Path

from moe_upgrpo.rollout.weights_folder import WeightsFolder

PROGRAM = """
import sys, time
from pathlib import Path
from moe_upgrpo.rollout.weights_folder import WeightsFolder
folder = WeightsFolder("weights-", sys.argv[1])
(Path(folder.name) / "version-1").mkdir()
print(folder.name, flush=True)
time.sleep(120)
"""


def test_what_a_killed_process_left_goes_at_the_next_start_and_not_before(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with other.stdout:
        left = Path(other.stdout.readline().strip())
        mine = WeightsFolder("weights-", tmp_path)
        assert (left / "version-1").is_dir()  # in use
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (left / "version-1").is_dir()
    foreign = tmp_path / "weights.txt"
    foreign.touch()
    second = WeightsFolder("weights-", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {Path(mine.name).name, Path(second.name).name, foreign.name}


def test_it_goes_with_cleanup_or_with_the_object(tmp_path):
    first, second = (WeightsFolder("weights-", tmp_path) for _ in range(2))
    (Path(first.name) / "file").touch()
    first.cleanup()
    first.cleanup()  # once more does nothing
    assert [str(path) for path in tmp_path.iterdir()] == [second.name]
    del second
    gc.collect()
    assert not list(tmp_path.iterdir())
