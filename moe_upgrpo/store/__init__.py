# SPDX-License-Identifier: Apache-2.0
"""Write and read the files that a run leaves on disk: config, metrics, token log.

Each name is imported from its module when it is first used: options and messages need only the
light modules, and no pyarrow.
"""

from typing import TYPE_CHECKING

from moe_upgrpo.lazy import exports

if TYPE_CHECKING:
    from moe_upgrpo.store.evaluations import read_evaluations, write_evaluation
    from moe_upgrpo.store.run_folder import (
        RunFolder,
        read_config,
        read_environment,
        read_metrics,
        rows_so_far,
    )
    from moe_upgrpo.store.schema import COLUMNS, LEVELS, SCHEMA_VERSION, TokenLayout
    from moe_upgrpo.store.token_log import overlap_array, read_routes, read_tokens
    from moe_upgrpo.store.token_writer import TokenLogWriter

__getattr__ = exports(
    __name__,
    {
        "evaluations": ("read_evaluations", "write_evaluation"),
        "run_folder": (
            "RunFolder",
            "read_config",
            "read_environment",
            "read_metrics",
            "rows_so_far",
        ),
        "schema": ("COLUMNS", "LEVELS", "SCHEMA_VERSION", "TokenLayout"),
        "token_log": ("overlap_array", "read_routes", "read_tokens"),
        "token_writer": ("TokenLogWriter",),
    },
)

__all__ = [
    "COLUMNS",
    "LEVELS",
    "SCHEMA_VERSION",
    "RunFolder",
    "TokenLayout",
    "TokenLogWriter",
    "overlap_array",
    "read_config",
    "read_environment",
    "read_evaluations",
    "read_metrics",
    "read_routes",
    "read_tokens",
    "rows_so_far",
    "write_evaluation",
]
