import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

import pytest

from moe_upgrpo import patching


@pytest.fixture(scope="session")
def megatron_series():
    """The patches of the installed release; None for one between those that have any."""
    installed = importlib.metadata.version("megatron-core")
    known = {series.version: series for series in patching.of_stack("megatron-core")}
    return known.get(installed)


@pytest.fixture(scope="session")
def megatron_root():
    """Where Megatron-Core is installed."""
    return Path(importlib.util.find_spec("megatron.core").origin).parents[2]


@pytest.fixture
def copy(tmp_path, megatron_root, megatron_series):
    """The files that are patched, and what says their version."""
    root = tmp_path / "site-packages"
    info = f"megatron_core-{megatron_series.version}.dist-info/METADATA"
    for file in [*megatron_series.files, info, "megatron/core/__init__.py"]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(megatron_root / file, root / file)
    return root
