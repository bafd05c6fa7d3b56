# SPDX-License-Identifier: Apache-2.0
"""Judge whether a difference is above zero, below it, or so small that it does not matter.

A difference that is "not significant" may be of any size. Saying that two arms are equal takes a
margin, the smallest difference that would matter, and two one-sided tests against it (Schuirmann,
J. Pharmacokinet. Biopharm. 15, 1987); saying that one is not worse takes one such test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from scipy.stats import t as student_t

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats.paired import holm

Claimed = Literal["more", "not less", "not more"]
Found = Literal["holds", "fails", "equal", "open"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference with its standard error and the error's degrees of freedom."""

    value: float
    error: float
    df: float

    @classmethod
    def of_interval(cls, value: float, high: float, df: float, confidence: float = 0.95) -> Self:
        """Make it from a Student's t interval: its centre and its upper end."""
        return cls(
            value=value, error=(high - value) / student_t.ppf((1 + confidence) / 2, df), df=df
        )

    def p_above(self, bound: float) -> float:
        """One-sided p-value of "it is at most `bound`": small where it is above."""
        if self.error == 0:
            return 0.0 if self.value > bound else 1.0
        return float(student_t.sf((self.value - bound) / self.error, self.df))

    def p_below(self, bound: float) -> float:
        return Difference(value=-self.value, error=self.error, df=self.df).p_above(-bound)

    def p_within(self, margin: float) -> float:
        """Two one-sided tests of "it is at least `margin` away from 0"."""
        return max(self.p_above(-margin), self.p_below(margin))


def judge(
    differences: Sequence[Difference], claimed: Claimed, margin: float, *, alpha: float = 0.05
) -> list[Found]:
    """Judge what each difference of one claim shows.

    Three tests for each, with Holm's correction over the claim's differences: *equal* where it lies
    within ± margin; else *holds* and *fails*. "more": above 0, or below it. "not less" ("not
    more"): above −margin (below margin), or beyond it on the other side; each of the two at half of
    alpha, like the ends of a two-sided interval. *open* otherwise.

    Raises:
        UserError: no difference, or a margin that is not above 0.
    """
    if not differences or not margin > 0:
        raise UserError(
            f"a claim takes differences and a margin above 0, got {len(differences)} and {margin}"
        )
    for_it = {
        "more": lambda d: (d.p_above(0), d.p_below(0)),
        "not less": lambda d: (d.p_above(-margin), d.p_below(-margin)),
        "not more": lambda d: (d.p_below(margin), d.p_above(margin)),
    }[claimed]
    within = holm([d.p_within(margin) for d in differences])
    holds, fails = (holm(ps) for ps in zip(*map(for_it, differences), strict=True))
    found: list[Found] = []
    for equal, hold, fail in zip(within, holds, fails, strict=True):
        said: list[tuple[float, Found]] = [
            (equal, "equal"),
            (2 * hold, "holds"),
            (2 * fail, "fails"),
        ]
        found.append(next((name for p, name in said if p < alpha), "open"))
    return found


def together(found: Sequence[Found], claimed: Claimed) -> Found:
    """Combine verdicts by one rule: more than half of the differences show it, none the opposite.

    An equal difference speaks for "not less" and "not more", and neither for nor against "more".
    """
    count = {name: found.count(name) for name in ("holds", "fails", "equal")}
    most = len(found) / 2
    spoken_for = count["holds"] + (count["equal"] if claimed != "more" else 0)
    if count["fails"]:
        return "fails" if count["fails"] > most and not spoken_for else "open"
    if count["equal"] > most and not (claimed == "more" and count["holds"]):
        return "equal"
    return "holds" if spoken_for > most else "open"
