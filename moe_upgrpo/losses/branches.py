# SPDX-License-Identifier: Apache-2.0
"""The table of losses: name -> `Branch`. The contract of a branch is `side.py`."""

from __future__ import annotations

from moe_upgrpo.losses.batch_branches import BATCH_BRANCHES
from moe_upgrpo.losses.classic_branches import CLASSIC_BRANCHES
from moe_upgrpo.losses.more_branches import MORE_BRANCHES
from moe_upgrpo.losses.side import Branch

BRANCHES: dict[str, Branch] = CLASSIC_BRANCHES | MORE_BRANCHES | BATCH_BRANCHES
