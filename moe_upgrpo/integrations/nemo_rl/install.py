# SPDX-License-Identifier: Apache-2.0
"""NeMo-RL: run one of its scripts with the losses of this library in place.

    python -m moe_upgrpo.integrations.nemo_rl examples/run_grpo.py --config … \\
        ++loss_fn.moe_upgrpo.preset=up-grpo

The name `ClippedPGLossFn` is rebound before the script imports it (grpo.py:695, ppo.py:476 and
single_controller_utils/setup.py:787 make the loss of a job). The loss is pickled by reference, so
the workers' environments need this package too. In a patched checkout (`moe-upgrpo patch apply
nemo-rl`) grpo.py and setup.py pick the loss by themselves. Flags: docs/nemo-rl.md. If something
that the job asks for is missing, start.py says so before it starts.
"""

import runpy
import sys
from importlib import import_module
from pathlib import Path

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import revisions
from moe_upgrpo.integrations.nemo_rl import start


def rebind() -> None:
    """Make `ClippedPGLossFn` `PolicyLossFn` wherever a job's loss is made; again is harmless."""
    revisions.check("nemo-rl", "loss")
    import nemo_rl.algorithms.loss as package

    from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn

    package.ClippedPGLossFn = PolicyLossFn
    for name in ("grpo", "ppo", "single_controller_utils.setup"):
        module = sys.modules.get(f"nemo_rl.algorithms.{name}")
        if module is not None:
            module.ClippedPGLossFn = PolicyLossFn


def main() -> None:
    script = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if script is None or not script.is_file():
        sys.exit(
            "usage: python -m moe_upgrpo.integrations.nemo_rl examples/run_grpo.py [its arguments] "
            f"++loss_fn.moe_upgrpo.preset=up-grpo; {script} given"
        )
    try:
        rebind()
        from moe_upgrpo.integrations.nemo_rl.loss import LOSSES

        print(f"moe_upgrpo: {len(LOSSES)} losses for loss_fn.moe_upgrpo.preset", flush=True)
        start.warn_of_missing_patch()
        import_module(start.POLICY)
        start.watch_policies()
        sys.argv = sys.argv[1:]
        sys.path[0] = str(script.parent.absolute())  # as with `python script`
        runpy.run_path(str(script), run_name="__main__")
    except UserError as error:
        sys.exit(str(error))
