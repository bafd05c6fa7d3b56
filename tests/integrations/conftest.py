import shutil

import pytest

from moe_upgrpo.tasks.arithmetic import save_tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_checkpoint, tmp_path_factory):
    """One with a tokenizer, whose texts a stack's run keeps; its last token ids have none."""
    folder = tmp_path_factory.mktemp("with-tokenizer") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    save_tokenizer(folder)
    return folder
