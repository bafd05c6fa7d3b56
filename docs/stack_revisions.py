"""The tables of the revisions that each stack's integration was tested with, from its hooks' data.

docs/make_tables.py puts them into the stacks' pages.
"""

from moe_upgrpo.integrations import hooks
from tests.integrations.places import CHECKOUTS, WHEELS


def rows(stack: str) -> list[list[str]]:
    """Revision; how it is run; its functions that differ from the revision listed last."""
    kept = hooks.read()[stack]
    pin = CHECKOUTS[stack][1] if stack in CHECKOUTS else WHEELS[stack]
    found = []
    for revision in sorted(kept, key=lambda name: name != pin):
        if revision in hooks.NOT_RUN.get(stack, ()):
            how = "not run: its functions were read"
        else:
            how = "`make test`" if revision == WHEELS.get(stack) else "`make test-stacks`"
        found.append([revision, how, *_against(stack, kept[pin], kept[revision])])
    return found


def _against(stack: str, pin: dict, here: dict) -> list[str]:
    """The number of functions, and those whose place, arguments or body differ."""
    if here is pin:
        return [str(len(here)), "the revision that the others are held against"]
    elsewhere, arguments, body, gone = [], [], [], []
    for hook in hooks.HOOKS[stack]:
        names = [f"{file}:{name}" for file, name in hooks.places(hook)]
        was = next((name for name in names if name in pin), None)
        now = next((name for name in names if name in here), None)
        if now is None:
            gone.append(hook[1])
        elif was is not None:
            if was != now:
                elsewhere.append(hook[1])
            if pin[was]["signature"] != here[now]["signature"]:
                arguments.append(hook[1])
            elif pin[was] != here[now]:
                body.append(hook[1])
    kinds = {
        "not there": gone,
        "elsewhere": elsewhere,
        "other arguments": arguments,
        "another body": body,
    }
    said = [f"{kind}: `{'`, `'.join(names)}`" for kind, names in kinds.items() if names]
    return [str(len(here)), "; ".join(said) or "all as there"]
