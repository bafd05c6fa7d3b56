# SPDX-License-Identifier: Apache-2.0
"""Whether engine and trainer differ from each other more than either from itself: a paired test."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_upgrpo.report.figures import FLOORS, number, plural
from moe_upgrpo.report.runs import Run
from moe_upgrpo.stats import MIN_PROMPTS, sign_flip_test

# Below this p, engine and trainer differ by more than a side differs from itself.
_SIGNIFICANT = 0.01


def counts(run: Run, name: str, steps: Sequence[int]) -> tuple[int, int] | None:
    """Routers that differ and routers compared, from the histograms of some steps."""
    if (tokens_M := run.summed(f"{name}/histogram", steps=steps)) is None:
        return None
    flips = sum(m * int(count) for m, count in enumerate(tokens_M))
    return flips, int(tokens_M.sum()) * (len(tokens_M) - 1)


@dataclass(frozen=True, kw_only=True)
class AgainstFloor:
    """Routers that differ, against the larger of both sides' noise floors, at the analysed steps.

    ``standing``: "below"; "above", by a test over prompts; "untold" where that test is undecided;
    "few" with too few prompts for it; "untested" above the floor without token rows; "unmeasured"
    without a floor; "stale" where every analysed step has an update between engine and trainer.
    ``more`` and ``fewer`` are the prompts with more and with fewer flips than in the floor.
    """

    standing: str
    rate: float | None = None
    floor: float | None = None
    prompts: int = 0
    more: int = 0
    fewer: int = 0
    p: float | None = None

    @property
    def times(self) -> str:
        """'10 times', or 'above' a floor of 0."""
        return f"{number(self.rate / self.floor)} times" if self.floor else "above"

    @property
    def seen(self) -> str:
        return f"in {self.more} of {plural(self.prompts, 'prompt')} and fewer in {self.fewer}"

    @property
    def flips(self) -> str:
        p = f"{self.p:.1g}" if self.standing == "above" else f"{self.p:.2g}"
        return f"sign flips by prompt, p = {p}"


def against_floor(run: Run) -> AgainstFloor:
    """Compare once, for all sentences; steps with stale samples are left out."""
    return run.once("against floor", lambda: _against_floor(run))


def _against_floor(run: Run) -> AgainstFloor:
    names = [f"noise/{kind}" for kind in FLOORS]
    analysed = sorted({step for name in names for step in run.series(f"{name}/router_rate")[0]})
    if not analysed:
        return AgainstFloor(standing="unmeasured")
    stale_steps = set(run.stale_steps)
    steps = [step for step in analysed if step not in stale_steps]
    if not steps:
        return AgainstFloor(standing="stale")
    rate = run.pooled("mismatch/router_rate", steps=steps)
    floors = {name: run.pooled(f"{name}/router_rate", steps=steps) for name in names}
    floors = {name: value for name, value in floors.items() if value is not None}
    if rate is None:
        return AgainstFloor(standing="unmeasured")
    largest = max(floors, key=floors.get)
    known = {"rate": rate, "floor": floors[largest]}
    if rate <= floors[largest]:
        return AgainstFloor(standing="below", **known)
    # Floor and mismatch are of the same tokens. In each prompt, their difference may have either
    # sign if engine and trainer are only as far apart as the side is from itself.
    found = run.tokens.above_floor(largest.replace("/", "_"), steps)
    if found is None:
        return AgainstFloor(standing="untested", **known)
    known |= {"prompts": len(found), "more": int((found > 0).sum())}
    known |= {"fewer": int((found < 0).sum())}
    if len(found) < MIN_PROMPTS:
        return AgainstFloor(standing="few", **known)
    p = sign_flip_test(found)
    return AgainstFloor(standing="untold" if p >= _SIGNIFICANT else "above", p=p, **known)


def told(found: AgainstFloor) -> str:
    """The comparison, as the end of a sentence about both rates."""
    if found.standing == "below":
        return ", no more than the largest floor"
    if found.standing == "untested":
        return "; no token rows tell by prompt whether that is above the largest floor"
    if found.standing == "above":
        much = f"{found.times} the largest floor" if found.floor else "above the floor"
        return f", {much} (more than the largest floor {found.seen}; {found.flips})"
    seen = f", more than the largest floor {found.seen}"
    if found.standing == "few":
        return f"{seen}: too few prompts to tell from the floor"
    return f"{seen}: cannot be told from the floor ({found.flips})"
