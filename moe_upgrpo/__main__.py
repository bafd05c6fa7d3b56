# SPDX-License-Identifier: Apache-2.0
from moe_upgrpo.cli import main

main()
