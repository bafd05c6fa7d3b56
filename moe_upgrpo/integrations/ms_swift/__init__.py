# SPDX-License-Identifier: Apache-2.0
"""ms-swift 4.6.0, Megatron GRPO: every preset whose inputs it has, and the routing log.

A file for `--external_plugins` imports this package: docs/ms-swift.md. `swift rollout`, data-loader
workers and other trainers import it too; there it does nothing.
"""

import sys

from moe_upgrpo.integrations.kit import environment, revisions

if "swift.megatron" in sys.modules:
    revisions.check("ms-swift", "log" if environment.run_folder() else "loss")
    from moe_upgrpo.integrations.ms_swift.install import install

    install()
