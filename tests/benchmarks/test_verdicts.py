"""The verdicts: what is judged and what is not, quotations that must stand, pages that follow.

The tests behind a verdict are in tests/stats/test_margins.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.studies import evidence, verdicts
from docs.sections import filled
from moe_upgrpo.compare.report import load
from moe_upgrpo.errors import UserError


class Made(evidence.Trained):
    """A comparison of which only the contrasts are given."""

    def __post_init__(self):
        contrasts = [
            {"arm": arm, "other": other, "difference": d, "low": d - 0.01, "high": d + 0.01,
             "seeds": 10}
            for arm, other, d in self.loaded
        ]  # fmt: skip
        object.__setattr__(self, "numbers", {"primary": contrasts, "exploratory": []})

    name = where = "made"

    def loss(self, arm):
        return arm.removesuffix("-bypass")

    def rate(self, arm):
        return 3e-5 if arm == "gspo-bypass" else 1e-5


def claim(rows, **more) -> verdicts.Claim:
    made = Made(loaded=rows)
    found = made.evidence("primary", "points", verdicts.points, 100)
    return verdicts.Claim(text="", source="", evidence=[found], **more)


def test_contrasts_that_are_confounded_are_shown_and_not_judged():
    """The pairs of other losses are not the claim's; unequal rates and another clip decide nothing:
    without them the claim holds by one contrast."""
    rows = [
        ("up-grpo", "grpo", 0.02),
        ("up-gspo-bypass", "gspo-bypass", -0.5),
        ("up-grpo", "dapo", -0.5),
        ("gspo", "grpo", -0.5),
        ("up-grpo-bypass", "up-grpo", -0.5),
    ]
    found = claim(rows, claimed="more", margin=1)
    assert found.verdict == "holds" and found.verdicts == ["holds"]
    assert found.evidence[0].effect == (
        "points: up-grpo − grpo +2.0 (+1.0 to +3.0); up-gspo-bypass − gspo-bypass −50.0 (−51.0 to "
        "−49.0; not judged: at 0.33 times the learning rate); up-grpo − dapo −50.0 (−51.0 to "
        "−49.0; not judged: dual clip 3 and 10)"
    )
    with pytest.raises(UserError, match="no contrast of seconds"):
        Made(loaded=rows).evidence("seconds", "s", str)


@pytest.mark.parametrize(
    ("difference", "claimed", "margin", "verdict"),
    [
        (0.0, "more", 2, "equal within the margin"),
        (0.0, "more", 0.5, "undecided at this scale"),
        (0.015, "not more", 1, "undecided at this scale"),
        (0.04, "not more", 1, "does not hold"),
        (0.04, "not less", 1, "holds"),
    ],
)
def test_a_claim_has_a_margin(difference, claimed, margin, verdict):
    """Intervals of ± 1 point."""
    found = claim([("up-grpo", "grpo", difference)], claimed=claimed, margin=margin)
    assert found.verdict == verdict


def test_claims_without_contrasts_are_what_their_pages_say():
    def said(*given: str) -> str:
        rows = [evidence.Evidence(where="", what="", command="", verdict=v) for v in given]
        return verdicts.Claim(text="", source="", evidence=rows).verdict

    assert said("holds") == "holds"
    assert said("not tested") == "not tested"
    assert said("holds", evidence.SHOWN) == "holds"
    assert said("holds", "does not hold") == "undecided at this scale"


def test_collapses_are_counted_by_loss():
    """On the kept data of a comparison in which no run fell, with two runs made to fall."""
    made = evidence.Trained(loaded=load(verdicts.committed()[0]))
    runs = made.loaded.by_arm
    crashed = replace(runs["up-grpo"][0], about=replace(runs["up-grpo"][0].about, status="crashed"))
    runs["up-grpo"] = [crashed, *runs["up-grpo"][1:]]
    runs["dapo"] = [crashed]  # another loss: not in the claim
    found = made.collapses(("up-grpo", "up-gspo"))
    assert found.verdict == evidence.SHOWN
    # Wilson's intervals of 1 and 0 of 10, from a table.
    assert found.effect == "collapsed: up-grpo 1 of 10 (2% to 40%); up-gspo 0 of 10 (0% to 28%)"
    with pytest.raises(UserError, match="no run of topr"):
        made.collapses(("topr",))


def test_collapses_of_several_arms_with_one_loss():
    """Those of stress by hand: held-out pass@1 of .34, .48, .38 at the start ends at .041, .186,
    .047 with grpo-lr-9x and .055, .282, .044 without clipping; GRPO's other arms end above the
    start.
    """
    (stress,) = (folder for folder in verdicts.committed() if folder.name == "stress")
    found = evidence.Trained(loaded=load(stress)).collapses(("grpo",)).effect
    assert found.endswith("grpo 5 of 18 (12% to 51%: grpo-lr-9x 3, grpo-lr-9x-unclipped 2)")


def test_contrasts_of_another_page_are_read_with_their_intervals():
    found = evidence.stressed("KL at 0.8", "nats", [("up-grpo", "grpo")])
    assert found.effect == "nats: up-grpo − grpo +0.080 (−0.149 to +0.309)"
    (difference,) = found.judged
    # Twelve seeds: t_11 = 2.201.
    assert difference.value == 0.08 and difference.error == pytest.approx(0.229 / 2.201, rel=1e-3)
    with pytest.raises(UserError, match=r"no 'KL at 0.8' of up-grpo − nothing"):
        evidence.stressed("KL at 0.8", "nats", [("up-grpo", "nothing")])


def test_a_quotation_that_is_gone_is_an_error():
    with pytest.raises(UserError, match=r"exact.md does not say 'nobody wrote this'"):
        evidence.quoted("exact.md", "nobody wrote this", "holds")


def test_the_pages_say_what_the_data_say():
    folders = verdicts.committed()
    assert folders
    found = verdicts.claims([evidence.Trained(loaded=load(folder)) for folder in folders])
    assert len(found) >= 12 and {one.source[:3] for one in found} == {"000", "001", "002"}
    text = Path("docs/verdicts.md").read_text()  # README.md quotes it: tests/test_pages.py
    assert filled(text, {"verdicts": verdicts.table(found, below="")}) == text
