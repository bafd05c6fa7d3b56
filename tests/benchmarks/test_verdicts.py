"""The verdicts: their rule by hand, quotations that must stand, pages that follow the data."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import verdicts
from benchmarks.exact.report import filled
from moe_upgrpo.compare.report import load
from moe_upgrpo.errors import UserError


class Made(verdicts.Trained):
    """A comparison of which only the contrasts are given."""

    def __post_init__(self):
        contrasts = [
            {"arm": arm, "other": other, "difference": d, "low": d - 0.01, "high": d + 0.01,
             "verdict": verdict}
            for arm, other, d, verdict in self.loaded
        ]  # fmt: skip
        object.__setattr__(self, "numbers", {"primary": contrasts, "exploratory": []})

    name = where = "made"

    def loss(self, arm):
        return arm.removesuffix("-bypass")

    def rate(self, arm):
        return 3e-5 if arm == "gspo-bypass" else 1e-5


@pytest.mark.parametrize(
    ("given", "side", "verdict"),
    [
        (["higher", "higher"], 1, "holds"),
        (["higher", "not told apart"], 1, "undecided at this scale"),
        (["higher", "lower"], 1, "does not hold"),
        (["lower", "lower"], -1, "holds"),
        (["higher", "not told apart"], -1, "does not hold"),
    ],
)
def test_rule(given, side, verdict):
    arms, others = ("up-grpo", "up-gspo-bypass"), ("grpo", "gspo-bypass")
    rows = zip(arms, others, (0.02, -0.003), given, strict=True)
    not_ups = [("gspo", "grpo", 0.0, "lower"), ("up-grpo-bypass", "up-grpo", 0.0, "lower")]
    made = Made(loaded=[*rows, *not_ups])
    found = made.evidence("primary", "points", side=side, unit=verdicts._points)
    assert found.verdict == verdict
    assert found.effect == (
        "points: up-grpo − grpo +2.0 (+1.0 to +3.0); "
        "up-gspo-bypass − gspo-bypass −0.3 (−1.3 to +0.7; at 0.33 times the learning rate)"
    )
    with pytest.raises(UserError, match="no contrast of seconds"):
        made.evidence("seconds", "s", side=1, unit=str)


def test_collapses_are_counted_by_loss():
    """On the kept data of a comparison in which no run fell, with two runs made to fall."""
    made = verdicts.Trained(loaded=load(verdicts.committed()[0]))
    runs = made.loaded.by_arm
    assert made.collapses().verdict == "undecided at this scale"
    crashed = replace(runs["up-grpo"][0], about=replace(runs["up-grpo"][0].about, status="crashed"))
    runs["up-grpo"] = [crashed, *runs["up-grpo"][1:]]
    runs["dapo"] = [crashed]  # another loss: not in the claim
    found = made.collapses()
    assert found.verdict == "does not hold"
    # Wilson's intervals of 1 and 0 of 10, from a table.
    assert "up-grpo 1 of 10 (2% to 40%); up-gspo 0 of 10 (0% to 28%)" in found.effect


def test_collapses_of_several_arms_with_one_loss():
    """Those of stress by hand: held-out pass@1 of .34, .48, .38 at the start ends at .041, .186,
    .047 with grpo-lr-9x and .055, .282, .044 without clipping; GRPO's other arms end above the
    start.
    """
    (stress,) = (folder for folder in verdicts.committed() if folder.name == "stress")
    found = verdicts.Trained(loaded=load(stress)).collapses().effect
    assert found.endswith("grpo 5 of 18 (12% to 51%: grpo-lr-9x 3, grpo-lr-9x-unclipped 2)")


def test_a_claim_is_its_weakest_evidence():
    def claim(*said: str) -> str:
        one = [verdicts.Evidence(where="", effect="", verdict=v, command="") for v in said]
        return verdicts.Claim(text="", source="", evidence=one).verdict

    assert claim("holds", "holds") == "holds"
    assert claim("holds", "undecided at this scale") == "undecided at this scale"
    assert claim("undecided at this scale", "does not hold") == "does not hold"


def test_a_quotation_that_is_gone_is_an_error():
    with pytest.raises(UserError, match=r"exact.md does not say 'nobody wrote this'"):
        verdicts.quoted("exact.md", "nobody wrote this", "holds")


def test_the_pages_say_what_the_data_say():
    folders = verdicts.committed()
    assert folders
    found = verdicts.claims([verdicts.Trained(loaded=load(folder)) for folder in folders])
    assert len(found) >= 7
    for page, made in (
        ("docs/verdicts.md", verdicts.table(found, below="")),
        ("README.md", verdicts.short(found)),
    ):
        text = Path(page).read_text()
        assert filled(text, {"verdicts": lambda made=made: made}) == text, page
