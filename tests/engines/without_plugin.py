"""pytest -p tests.engines.without_plugin: vLLM as it is on disk; ours mends nothing at run time.

For the tests of the engine on a patched copy of vLLM (docs/patches.md).
"""

import os
from functools import cache

from moe_upgrpo.rollout import vllm_plugin

os.environ["VLLM_PLUGINS"] = ""


@cache
def register() -> bool:
    return True


vllm_plugin.register = register
