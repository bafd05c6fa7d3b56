"""The name by which a patched NeMo-RL finds the routing log."""

from moe_upgrpo.integrations.kit import environment, revisions

revisions.check("nemo-rl", "log" if environment.run_folder() else "loss")

from moe_upgrpo.integrations.nemo_rl.log import logged  # noqa: E402

__all__ = ["logged"]
