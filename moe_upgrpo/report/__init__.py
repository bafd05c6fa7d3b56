"""The report: one HTML file that opens offline, made from run folders alone."""

from moe_upgrpo.errors import UserError

try:
    from moe_upgrpo.report.live import follow
    from moe_upgrpo.report.opening import opening
    from moe_upgrpo.report.page import write_page, write_report
    from moe_upgrpo.report.runs import load_runs
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "jinja2", "scipy"):
        raise
    raise UserError(
        f"the report needs {error.name}, which is not installed: pip install 'moe_upgrpo[report]'"
    ) from None

__all__ = ["follow", "load_runs", "opening", "write_page", "write_report"]
