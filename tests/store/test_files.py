"""Names of new folders. Whole files are tested where they are written."""

import re

from moe_upgrpo.store.files import new_folder


def test_a_new_folder_has_a_name_that_nothing_has(tmp_path, monkeypatch):
    """Also in the same second, and beside a file of that name."""
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = new_folder("probe")
        assert not folder.exists()
        folder.mkdir(parents=True)
        names.append(folder.as_posix())
    assert len({*names}) == 3
    assert all(re.fullmatch(r"runs/probe-\d{8}-\d{6}(-[23])?", name) for name in names)
