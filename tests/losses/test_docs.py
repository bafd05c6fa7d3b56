"""docs/losses.md has the tables of the code; docs/img/losses.svg has every preset's curve."""

import importlib.util
from pathlib import Path

import pytest

from moe_upgrpo.losses.config import PRESETS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_loss_page", DOCS / "make_loss_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_up_to_date(maker):
    page = (DOCS / "losses.md").read_text()
    assert maker.filled(page) == page, "run python docs/make_loss_page.py"


def test_a_missing_section_is_an_error(maker):
    with pytest.raises(KeyError, match="section presets appears 0 times"):
        maker.filled("# Losses")


def test_the_figure_shows_every_family(maker):
    """By its text; the curves themselves are those of `gradient_coefficients`, tested elsewhere."""
    svg = (DOCS / "img" / "losses.svg").read_text()
    drawn = {preset for presets in maker.PANELS.values() for preset in presets}
    for preset in drawn:
        assert f"{preset}, A &gt; 0" in svg
    branches = {(PRESETS[p].positive, PRESETS[p].negative) for p in drawn}
    missing = {
        name
        for name, config in PRESETS.items()
        if not name.startswith("up-") and (config.positive, config.negative) not in branches
    }
    # The first two have the curve of gspo, clip-cov and kl-cov those of grpo and symmetric-ratio
    # but for a few tokens; the others' is no function of r.
    assert missing == {"gspo-token", "luspo", "clip-cov", "kl-cov", "vapo", "real", "gtpo"}
