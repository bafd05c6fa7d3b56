"""What a run leaves on disk, written and read: config, metrics, token log."""

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
