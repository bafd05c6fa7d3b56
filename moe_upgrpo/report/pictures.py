# SPDX-License-Identifier: Apache-2.0
"""A drawing as part of a page: an SVG inside its HTML, with real text and the page's colours.

A page that is dark, printed or read aloud needs more than an image: here text is text, colours are
the page's variables (style.css), and words say what is to be seen.
"""

import re
from xml.etree import ElementTree

from markupsafe import Markup

from moe_upgrpo.report.plots import COLORS, EDGE, GRID, SOFT

_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_VARIABLES = {
    **{color.lower(): f"var(--c{i})" for i, color in enumerate(COLORS)},
    SOFT: "var(--soft)",
    EDGE: "var(--edge)",
    GRID: "var(--line)",
}
_COLOR = re.compile("|".join(_VARIABLES), re.IGNORECASE)


def themed(color: str) -> str:
    """The page's variable for a drawing's colour, or the colour itself where there is none."""
    return _VARIABLES.get(color.lower(), color)


def inline(drawing: str, *, key: str, alt: str) -> Markup:
    """Turn an SVG of `plots.svg` into an element of a page. ``key`` makes its ids unique there."""
    root = ElementTree.fromstring(drawing)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    named = {name for pair in used for name in pair if name}
    _tidy(root, key, named)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    body = "".join(_written(child) for child in root)
    box = _escaped(root.attrib["viewBox"])
    return Markup(
        f'<svg class="plot" viewBox="{box}" role="img" aria-label="{_escaped(alt)}">{body}</svg>'
    )


def _tidy(element: ElementTree.Element, key: str, named: set[str]) -> None:
    """Drop what a page can do without; name, colour and round the rest."""
    for child in list(element):
        kind = child.tag.rpartition("}")[2]
        if kind in ("metadata", "style"):
            element.remove(child)
            continue
        found = child.attrib
        if found.get("id") not in named:
            found.pop("id", None)
        else:
            found["id"] = f"{key}-{found['id']}"
        if kind == "text":
            found["style"] = re.sub(r"font-family:[^;]*;? ?", "", found.get("style", ""))
            if found.get("transform", "").startswith("rotate(-0 "):
                del found["transform"]
        for name in found:
            if name.endswith("href") and found[name].startswith("data:"):
                continue
            value = re.sub(r"(url\(#|^#(?=[a-z]))", rf"\g<1>{key}-", found[name])
            if name == "style":
                value = _COLOR.sub(lambda match: _VARIABLES[match[0].lower()], value)
            found[name] = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value)
        if name := found.get("d"):
            found["d"] = " ".join(name.split())
        _tidy(child, key, named)


def _written(element: ElementTree.Element) -> str:
    """Write an element in HTML's syntax, without prefixes and empty groups."""
    kind = element.tag.rpartition("}")[2]
    inside = "".join(_written(child) for child in element)
    if kind == "g" and not element.attrib:
        return inside
    attributes = "".join(
        f' {name.rpartition("}")[2]}="{_escaped(value)}"' for name, value in element.attrib.items()
    )
    text = _escaped(element.text or "") if kind in ("text", "tspan", "title") else ""
    return f"<{kind}{attributes}>{text}{inside}</{kind}>"


def _escaped(text: str) -> str:
    return str(Markup.escape(text))
