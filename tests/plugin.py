"""A plug-in package as somebody else would write it, installed into a folder of its own."""

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/extending.md"
_TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", _TEXT, re.DOTALL))
"""The package of the page, by the names of its blocks."""
(ENTRY_POINT,) = re.findall(r"```toml\n(.*?)```", _TEXT, re.DOTALL)

MODULE = '''

from moe_upgrpo.losses import BRANCHES, Branch, Side, register_advantage, register_loss
from moe_upgrpo.rewards import register_reward


def close(problem, response, row):
    """1 for the sum, and half of it for its last digit."""
    if response == "9":
        raise RuntimeError("no nines")
    right = response == problem.answer
    return {"score": float(right) or 0.5 * (response[-1:] == problem.answer[-1]), "acc": right}


def weight(t, cfg):
    return t.ratio_BT.detach().clamp(max=cfg.ratio_cap)


register_reward("close", close)
register_loss(
    "capped",
    Branch(
        positive=BRANCHES["log-likelihood"].positive,
        negative=Side(lambda t, cfg: weight(t, cfg) * t.log_probs_BT, weight),
        c=("1", "min(r, cap)"),
        fields=("ratio_cap",),
        source="mine",
    ),
    ratio_cap=2.0,
)
register_advantage("centred-ranks", lambda r: r.argsort(-1).argsort(-1) - (r.shape[-1] - 1) / 2)
'''


def install(
    folder: Path,
    *,
    name: str = "my_moe",
    module: str = MODULE,
    value: str = "",
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a module, or a package of `files`, and the metadata that pip would leave.

    The folder is to be on the path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if files is None:
        (folder / f"{name}.py").write_text(module, encoding="utf-8")
    else:
        (folder / name).mkdir()
    for file, text in (files or {}).items():
        (folder / name / file).write_text(text, encoding="utf-8")
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        f"[moe_upgrpo.plugins]\n{name} = {value or name}\n", encoding="utf-8"
    )
    return folder


def project(folder: Path) -> Path:
    """Write the page's package as a folder that pip installs."""
    (folder / "my_moe").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n\n'
        f'[project]\nname = "my_moe"\nversion = "1.2"\n\n{ENTRY_POINT}',
        encoding="utf-8",
    )
    for file, text in FILES.items():
        (folder / "my_moe" / file).write_text(text, encoding="utf-8")
    return folder
