"""The time something took, and the machine; tables and figures as small as possible."""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_upgrpo.store.files import write_text


class Stopwatch:
    """Wall-clock and CPU time since its creation."""

    def __init__(self):
        self.begun, self.cpu = time.time(), time.process_time()

    def made(self) -> dict:
        return {
            "wall_s": time.time() - self.begun,
            "cpu_s": time.process_time() - self.cpu,
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


def said(made: dict) -> str:
    return (
        f"Made in {made['wall_s'] / 60:.1f} minutes ({made['cpu_s'] / 60:.1f} of CPU) on one of "
        f"{made['cores']} shared cores ({made['processor']}), Python {made['python']}, "
        f"torch {made['torch']}."
    )


def processor() -> str:
    """Name of the CPU where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_small(frame: pd.DataFrame, file: Path) -> None:
    """Write a table to Parquet. Mantissas are random: only their bytes side by side compress."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    pq.write_table(
        table,
        file,
        compression="zstd",
        compression_level=19,
        use_byte_stream_split=floats,
        use_dictionary=[name for name in table.column_names if name not in floats],
    )


def subplots(rows: int = 1, columns: int = 1, **style) -> tuple[Figure, Axes]:
    """Axes of a figure that is not tied to a window, as `plt.subplots` gives them."""
    figure = Figure(figsize=style.pop("figsize"))
    return figure, figure.subplots(rows, columns, **style)


def draw_all(folder: Path, salt: str, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw each figure into FOLDER/NAME.svg; the same numbers give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 8}):
        for name, draw in figures.items():
            figure, written = draw(), StringIO()
            figure.tight_layout()
            figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
            write_text(folder / f"{name}.svg", smaller(written.getvalue()))


def smaller(svg: str) -> str:
    """The same drawing in half the bytes: to hundredths of a point, invisible parts gone."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'="[^"]*"', lambda attribute: _NUMBER.sub(_shorter, attribute[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def _shorter(found: re.Match) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def marked(sections: Mapping[str, Callable[[], str]], command: str) -> dict[str, str]:
    """Sections as on a page, with a note for readers that a command generated them, and which."""
    return {name: f"{make()}\n\n<sub>made by `{command}`</sub>" for name, make in sections.items()}


def as_page(sections: Mapping[str, Callable[[], str]]) -> str:
    return "\n".join(f"## {name}\n\n{make()}\n" for name, make in sections.items())
