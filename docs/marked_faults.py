"""The faults that tests cover, from `@pytest.mark.fault(AREA, FAULT, WHAT_HAPPENS)` above each.

They fill the tables of docs/reliability.md. Read from the source: no test need be imported, and a
test that runs elsewhere (GPU, servers, minutes) is included too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
AREAS = (
    "Models that are read",
    "Models that are written",
    "Run folders",
    "Comparisons",
    "Ranks, hosts and workers",
    "Numbers",
    "Problems and routes",
    "Servers and other people's files",
    "How a command ends",
)


def read(folder: Path = TESTS) -> list[tuple[str, str, str, str, str]]:
    """Area, fault, what happens, test and, where it is not in `make test`, the command it is in.

    Raises ValueError naming a marker that is malformed or of no area, or where there is none.
    """
    found = [row for file in sorted(folder.rglob("test_*.py")) for row in _of_file(file, folder)]
    if not found:
        raise ValueError(f"no test under {folder} is marked with pytest.mark.fault")
    return sorted(found, key=lambda row: AREAS.index(row[0]))  # stable: by file within an area


def _of_file(file: Path, folder: Path) -> Iterator[tuple[str, str, str, str, str]]:
    name = file.relative_to(folder.parent).as_posix()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = {ast.unparse(one).partition("(")[0] for one in node.decorator_list}
        for one in node.decorator_list:
            if ast.unparse(one).partition("(")[0] != "pytest.mark.fault":
                continue
            try:
                words = [ast.literal_eval(argument) for argument in one.args]
                area, fault, happens = words
                if area not in AREAS or not all(words):
                    raise ValueError(area)
            except (ValueError, AttributeError):
                raise ValueError(
                    f"{name}::{node.name}: fault(AREA, FAULT, WHAT_HAPPENS) is needed, AREA of "
                    f"{', '.join(AREAS)}."
                ) from None
            if name.startswith("tests/engines/"):
                command = "make test-engines"
            else:
                command = "make test-slow" if "pytest.mark.slow" in marks else ""
            yield area, fault, happens, f"{name}::{node.name}", command


def markdown(folder: Path = TESTS) -> str:
    """A table for each area."""
    rows, text = read(folder), []
    for area in AREAS:
        text += [f"## {area}\n", "| fault | what happens | test |", "| --- | --- | --- |"]
        for of, fault, happens, test, command in rows:
            if of == area:
                file, _, name = test.partition("::")
                where = f"[`{name}`](../{file})" + (f" (`{command}`)" if command else "")
                cells = (cell.replace("|", "\\|") for cell in (fault, happens))
                text.append("| " + " | ".join((*cells, where)) + " |")
        text.append("")
    return "\n".join(text).rstrip("\n")
