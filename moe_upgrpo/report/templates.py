# SPDX-License-Identifier: Apache-2.0
"""Pages made from a template: a run report, a comparison and a diagnosis share style and rules."""

from pathlib import Path
from typing import Any

import jinja2

_HERE = Path(__file__).parent


def render(template: Path, /, **values: Any) -> str:
    """Fill a template, which may include the report's style. A missing value raises."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
