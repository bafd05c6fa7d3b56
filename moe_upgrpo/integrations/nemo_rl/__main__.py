# SPDX-License-Identifier: Apache-2.0
"""Run one of NeMo-RL's scripts with the losses in place: see `install`."""

from moe_upgrpo.integrations.nemo_rl.install import main

if __name__ == "__main__":
    main()
