"""The generated parts of a page, between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from moe_upgrpo.store.files import write_text


def filled(page: str, sections: Mapping[str, str | Callable[[], str]]) -> str:
    """The page with every generated section made anew; KeyError if one of them is missing."""
    for name, section in sections.items():
        text = section if isinstance(section, str) else section()
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        page, count = re.subn(
            pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise KeyError(f"section {name} appears {count} times in the page")
    return page


def fill(page: Path, sections: Mapping[str, str | Callable[[], str]]) -> None:
    """Make the generated sections of a page's file anew; KeyError if one of them is missing."""
    write_text(page, filled(page.read_text(encoding="utf-8"), sections))
