# SPDX-License-Identifier: Apache-2.0
"""A run as a person sees it: one live line on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_upgrpo.record.alarms import ALARMS, Raised
from moe_upgrpo.store.phases import PHASES, waiting_share
from moe_upgrpo.train.console import Console


class Display:
    """Shows steps as they finish, and the summary at the end. Silent where `shown` is False.

    closed: called once the reader of standard output is gone, as `| head` is.
    """

    def __init__(self, steps: int, *, shown: bool, closed: Callable[[], None]):
        self.console = Console(closed, quiet=not shown, highlight=False, soft_wrap=True)
        self._explained: set[str] = set()
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,  # the summary below takes its place
            disable=not (shown and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def _alarms(self, step: int, raised: Sequence[Raised]) -> None:
        """Explain each alarm when it is first raised; afterwards only name it."""
        for one in raised:
            means = "" if one.name in self._explained else f": {ALARMS[one.name].means}"
            self._explained.add(one.name)
            self.say(f"ALARM at step {step}: {one.short}{means}")

    def resumed(self, done: int, changed: dict[str, list], edited: dict[str, list]) -> None:
        """Say from where the run goes on, and which settings differ.

        changed: by options of this start; edited: in config.json, by somebody.
        """
        self._bar.update(self._task, completed=done)
        if edited:
            named = "; ".join(f"{name} {old} → {new}" for name, (old, new) in edited.items())
            self.say(f"config.json was edited since the run wrote it, and is followed: {named}")
        anew = "".join(f"; {name} {old} → {new}" for name, (old, new) in changed.items())
        self.say(f"resumed after step {done}{anew}")

    def step(self, row: dict, raised: Sequence[Raised] = ()) -> None:
        """Show a finished step; on its own line where there is no bar, or it was evaluated."""
        routing = (
            f"routers differing {row['mismatch/router_rate']:.2%}  "
            if "mismatch/router_rate" in row
            else ""  # a dense model
        )
        line = (
            f"reward {row['reward/mean']:.3f}  entropy {row['entropy/mean']:.3f}  "
            f"clipped +{_share(row['clip/positive'])} -{_share(row['clip/negative'])}  "
            f"grad {row['grad_norm']:.2f}  {routing}{row['tokens_per_second']:,.0f} tok/s"
        )
        if "eval/greedy" in row:
            line += f"  held-out greedy {row['eval/greedy']:.3f} pass@1 {row['eval/pass@1']:.3f}"
        if raised:
            line += f"  ALARM {', '.join(one.name for one in raised)}"
        self._bar.update(self._task, advance=1, description=line)
        if self._bar.disable or "eval/greedy" in row:
            self.say(f"step {row['step']:>4}  {line}")
        self._alarms(row["step"], raised)

    def summary(self, rows: list[dict]) -> None:
        """Accuracy before and after, and where the time went, from the rows of the whole run."""
        self._bar.stop()
        evaluated = [row for row in rows if "eval/greedy" in row]
        trained = [row for row in rows if "time/total" in row]
        if evaluated:
            table = Table("held-out", "warm start", "best", "last", box=None)
            for name in sorted(key for key in evaluated[0] if key.startswith("eval/")):
                # pass@1 and pass@n by their other names
                if name.startswith(("eval/problems", "eval/avg@", "eval/best@")):
                    continue
                values = [row[name] for row in evaluated]
                shown = (values[0], max(values), values[-1])
                table.add_row(name.removeprefix("eval/"), *(f"{value:.3f}" for value in shown))
            self.console.print(table)
        total = sum(row["time/total"] for row in trained)
        tokens = sum(row["tokens/sampled"] for row in trained)
        split = "; ".join(
            f"{text} {sum(r[f'time/{phase}'] for r in trained) / total:.0%}"
            + _waiting(trained, phase)
            for phase, text in PHASES.items()
        )
        self.say(
            f"{tokens / total:,.0f} sampled tokens/s over {len(trained)} full RL steps of "
            f"{total / len(trained):.2f} s ({split}); evaluation not counted"
        )


def _waiting(rows: Sequence[dict], phase: str) -> str:
    """Say what share of a phase was waiting; nothing where that rounds to 0 or was not measured."""
    share = f"{waiting_share(rows, phase) or 0:.0%}"
    return "" if share == "0%" else f", {share} of it waiting"


def _share(value: float) -> str:
    """A share in percent; a dash where nothing was counted."""
    return "–" if math.isnan(value) else f"{value:.1%}"
