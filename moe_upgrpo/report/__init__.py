# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that opens offline, made only from run folders."""

from moe_upgrpo import extras

try:
    from moe_upgrpo.report.live import follow
    from moe_upgrpo.report.opening import opening
    from moe_upgrpo.report.page import write_page, write_report
    from moe_upgrpo.report.runs import load_runs
except ModuleNotFoundError as error:
    if absent := extras.absent(error):
        raise absent from None
    raise

__all__ = ["follow", "load_runs", "opening", "write_page", "write_report"]
