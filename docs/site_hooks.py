"""Hooks of the site (mkdocs.yml): a mark at each generated part, and links out of docs/.

On GitHub the pages are read as they are, where `../` leads into the repository. The site links to
the repository where mkdocs.yml names one (repo_url), and shows the path else.
"""

import re
from typing import Any

BEGIN = (
    '\n<p class="generated">Generated from the code, its tests or kept results; '
    "an edit here is overwritten.</p>\n\n"
)
END = '\n\n<p class="generated-end">End of the generated part.</p>\n'
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, /, *, config: Any, **_: Any) -> str:
    """The page as the site has it; mkdocs calls this for each."""
    repository = (config["repo_url"] or "").rstrip("/")
    markdown = re.sub(r"<!-- begin \S+ -->\n", BEGIN, markdown)
    markdown = re.sub(r"\n<!-- end \S+ -->", END, markdown)
    if repository:
        return _OUTSIDE.sub(rf"[\1]({repository}/blob/main/\2)", markdown)
    return _OUTSIDE.sub(r"\1 (`\2`)", markdown)
