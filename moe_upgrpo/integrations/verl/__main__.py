# SPDX-License-Identifier: Apache-2.0
"""Check in a fresh process that verl finds the losses: `python -m moe_upgrpo.integrations.verl`."""

import sys

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.verl import check

if __name__ == "__main__":
    try:
        check(*sys.argv[1:2])
    except UserError as error:
        sys.exit(str(error))
