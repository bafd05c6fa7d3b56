# SPDX-License-Identifier: Apache-2.0
"""The name by which a patched NeMo-RL finds the routing log."""

from moe_upgrpo.integrations.kit import environment, revisions

revisions.check("nemo-rl", "log" if environment.run_folder() else "loss")

from moe_upgrpo.integrations.nemo_rl import health  # noqa: E402
from moe_upgrpo.integrations.nemo_rl.log import logged as with_log  # noqa: E402


def logged(worker_class: type) -> type:
    """Return the class with the log, and with a replay's health figures."""
    if revisions.has("nemo-rl", "health"):
        worker_class = health.reported(worker_class)
    return with_log(worker_class)


__all__ = ["logged"]
