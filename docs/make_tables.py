"""Fills the tables of the pages in docs/ that are made from the code and the tests.

    python -m docs.make_tables

The text between `<!-- begin NAME -->` and `<!-- end NAME -->` is generated; the rest is written by
hand. tests/store/test_docs.py fails when a page is not up to date.
"""

from pathlib import Path

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import page as gpu_page
from docs import marked_faults, stack_revisions, train_options
from docs.sections import fill
from moe_upgrpo.megatron import passed_fields
from moe_upgrpo.record.alarms import ALARMS
from moe_upgrpo.store import COLUMNS, LEVELS
from moe_upgrpo.store.metrics import markdown_table
from moe_upgrpo.store.questions import GROUPINGS, QUANTITIES
from moe_upgrpo.store.schema import Column
from moe_upgrpo.tools.diagnose.causes import CAUSES
from moe_upgrpo.train.options import MAY_CHANGE
from tests.integrations import megatron_lm_scripts, nemo_rl_recipe, slime_scripts, verl_settings
from tests.patches import faults

DOCS = Path(__file__).parent
CHECKS = [[one.name, one.means, f"{one.budget_s:g}"] for one in gpu_checks.CHECKS]


def table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in cells)


def revisions(stack: str) -> str:
    heads = ["revision", "run by", "functions hooked into", "against the first"]
    return table(heads, stack_revisions.rows(stack))


def _absence(column: Column) -> str:
    return "yes" if column.optional else "may be null" if column.nullable else ""


PAGES = {
    "verl.md": {
        "revisions": revisions("verl"),
        "replay-example": verl_settings.markdown_table(),
    },
    "slime.md": {
        "revisions": revisions("slime"),
        "miles-revisions": revisions("miles"),
        "script": slime_scripts.markdown(),
    },
    "nemo-rl.md": {
        "revisions": revisions("nemo-rl"),
        "recipe": table(["setting", "value", "accepted"], nemo_rl_recipe.rows("7ea279a")),
        "releases": table(
            ["revision", "functions hooked into", "single controller", "patches"],
            nemo_rl_recipe.revisions(),
        ),
    },
    "megatron-lm.md": {
        "revisions": revisions("megatron-lm"),
        "settings": megatron_lm_scripts.markdown(),
    },
    "ms-swift.md": {"revisions": revisions("ms-swift")},
    "gpu.md": {
        "results": gpu_page.section(),
        "checks": table(["check", "what it looks at", "s"], CHECKS),
    },
    "token-log.md": {
        "columns": table(
            ["column", "Arrow type", "optional", "meaning"],
            [[f"`{name}`", f"`{c.type}`", _absence(c), c.meaning] for name, c in COLUMNS.items()],
        ),
        "levels": table(["level", "rows"], [[f"`{name}`", text] for name, text in LEVELS.items()]),
        "quantities": table(
            ["quantity", "meaning"], [[f"`{name}`", q.meaning] for name, q in QUANTITIES.items()]
        ),
        "groupings": table(
            ["by", "reads", "groups"],
            [[f"`{name}`", f"`{column}`", text] for name, (column, text) in GROUPINGS.items()],
        ),
    },
    "mismatch.md": {
        "metrics": markdown_table().rstrip("\n"),
        "alarms": table(
            ["alarm", "rings when", "likely cause", "next", "limits"],
            [
                [f"`{name}`", a.rings, a.cause, a.command, ", ".join(f"`{n}`" for n in a.limits)]
                for name, a in ALARMS.items()
            ],
        ),
    },
    "diagnose.md": {
        "causes": table(
            ["cause", "says that", "what to do", "as it is typed"],
            [
                [f"`{c.name}`", c.says, c.remedy, f"`{c.command}`" if c.command else ""]
                for c in CAUSES.values()
            ],
        ),
    },
    "options.md": {"options": train_options.markdown()},
    "patches.md": {"faults": faults.markdown_table()},
    "reliability.md": {"faults": marked_faults.markdown()},
    "scale.md": {
        "passed": table(["about", "options"], passed_fields.rows(passed_fields.PASSED)),
        "refused": table(
            ["why", "options"],
            [
                *(
                    [f"set by {ours}", names]
                    for ours, names in passed_fields.rows(passed_fields.OURS)
                ),
                *passed_fields.rows(passed_fields.REFUSED),
            ],
        ),
    },
    "checkpoints.md": {
        "may_change": table(
            ["setting", "what it is"], [[f"`{name}`", text] for name, text in MAY_CHANGE.items()]
        ),
    },
}


if __name__ == "__main__":
    for name, sections in PAGES.items():
        page = DOCS / name
        fill(page, sections)
