"""The direction of the imports, and that the pure parts need nothing but torch and numpy."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from moe_upgrpo.rollout.engines import EngineName

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_upgrpo"
# Each may import those before it (and itself).
ORDER = (
    "errors",
    "lazy",
    "ending",
    "kernels",
    "patching",
    "losses",
    "routing",
    "stats",
    "store",
    "record",
    "report",
    "hugging_face",
    "tasks",
    "rollout",
    "megatron",
    "train",
    "tools",
    "compare",
    "integrations",
)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = imports(path)
    ours = {
        n.split(".")[1]
        for n in found
        if n.startswith("moe_upgrpo.") and n != "moe_upgrpo.__version__"
    }
    if folder in ORDER:
        allowed = set(ORDER[: ORDER.index(folder) + 1])
        # The report reads what runs left and knows nothing of how they were made.
        allowed = {"errors", "stats", "store", "report"} if folder == "report" else allowed
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"
    uses_megatron = any(name.split(".")[0] == "megatron" for name in found)
    assert not uses_megatron or folder in ("megatron", "integrations")


def test_there_are_files_to_check():
    assert len(FILES) > 30


PURE = (
    "losses",
    "routing",
    "stats",
    "store",
    "megatron.layout",
    "megatron.memory",
    "train.config",
    "train.options",
    "record",
    "integrations.kit.run_log",
)
# What a call would run code from, or from where somebody's objects would come.
CODE_FROM_FILES = {"pickle.load", "pickle.loads", "dill.load", "joblib.load", "shelve.open",
                   "torch.load", "yaml.load", "np.load", "numpy.load", "eval", "exec"}  # fmt: skip
SAFELY = {
    # The file's calls, with what makes them safe.
    "megatron/checkpoint.py": "weights_only=True",
    "rollout/vllm_server.py": "allow_pickle=False",
    "train/options.py": "_Loader",  # a yaml.SafeLoader
    "tools/route_dumps.py": ("allow_pickle=False", "weights_only=True"),
}


def test_no_file_that_is_read_can_run_code():
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CODE_FROM_FILES:
                found.setdefault(str(path.relative_to(PACKAGE)), []).append(ast.unparse(node))
    assert found.keys() <= SAFELY.keys(), found
    unsafe = [
        call
        for name, calls in found.items()
        for call in calls
        if not any(safe in call for safe in np.atleast_1d(SAFELY[name]))
    ]
    assert not unsafe and "megatron/checkpoint.py" in found


def without_encoding(path: Path) -> list[str]:
    """The calls that read or write text in the encoding of the locale, which may be ASCII."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        owner, _, name = ast.unparse(node.func).rpartition(".")
        modes = [given.get("mode", ""), *map(ast.unparse, node.args)]
        binary = any("b" in mode and set(mode) <= set("rwaxb+'") for mode in modes)
        text = (
            (name in ("read_text", "write_text") and owner)
            or (name in ("open", "fdopen") and (owner, name) != ("os", "open") and not binary)
            or "True" in (given.get("text"), given.get("universal_newlines"))
        )
        if text and "encoding" not in given:
            found.append(f"{path}, line {node.lineno}: {ast.unparse(node)}")
    return found


def test_texts_and_pipes_name_their_encoding():
    scripts = [
        f for name in ("benchmarks", "docs", "examples") for f in (ROOT / name).rglob("*.py")
    ]
    checked = [*FILES, *scripts, ROOT / "setup.py"]
    assert len(checked) > 120
    assert not [call for path in checked for call in without_encoding(path)]


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("Path('a').read_text()", 1),
        ("Path('a').write_text('b', errors='replace')", 1),
        ("open('a')", 1),
        ("Path('a').open('a')", 1),
        ("os.fdopen(0, 'w')", 1),
        ("subprocess.run(['a'], text=True)", 1),
        ("Path('a').read_text(encoding='utf-8')", 0),
        ("Path('a').open('rb')", 0),
        ("open('a', mode='wb')", 0),
        ("os.open('a', os.O_RDONLY)", 0),
        ("write_text(file, 'a')", 0),
        ("subprocess.run(['a'], encoding='utf-8')", 0),
    ],
)
def test_which_calls_that_are(line, calls, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(line, encoding="utf-8")
    assert len(without_encoding(file)) == calls


# One interpreter, which has imported what any part may and forks for each.
IMPORT_EACH = f"""
import os, sys
import torch, transformers
for part in {PURE}:
    if os.fork() == 0:
        __import__("moe_upgrpo." + part)
        found = [m for m in ("megatron", "vllm", "sglang", "ray") if m in sys.modules]
        print(part, *found, flush=True)
        os._exit(0)
    os.wait()
"""


def test_pure_parts_import_without_megatron_or_engines():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH], capture_output=True, encoding="utf-8"
    )
    assert result.stdout.split("\n") == [*PURE, ""], result.stdout + result.stderr


def engines_compared(path: Path) -> list[str]:
    """The places where code asks which engine it is, in place of what its record says."""
    names, found = set(get_args(EngineName)), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        asked: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            asked = node.value.keys
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if node.func.attr == "get" and isinstance(of, ast.Dict):
                asked = of.keys
            elif node.func.attr in ("startswith", "endswith"):
                asked = node.args
        constants = [c for part in asked if part for c in ast.walk(part)]
        if any(isinstance(c, ast.Constant) and c.value in names for c in constants):
            found.append(f"{path}, line {node.lineno}")
    return found


def test_nothing_outside_rollout_compares_engine_names():
    """Else a new engine has to be known there too: `moe_upgrpo.rollout.engines.ENGINES` tells."""
    outside = [f for f in FILES if f.relative_to(PACKAGE).parts[0] != "rollout"]
    assert len(outside) > 100
    assert not [place for path in outside for place in engines_compared(path)]


@pytest.mark.parametrize(
    ("code", "places"),
    [
        ("config.engine == 'hf'", 1),
        ("'vllm' != config.engine", 1),
        ("config.engine in ('vllm', 'sglang')", 1),
        ("match config.engine:\n    case 'sglang' | 'other':\n        pass", 1),
        ("{'hf': 1, 'vllm': 2}[config.engine]", 1),
        ("{'hf': 1}.get(config.engine)", 1),
        ("config.engine.startswith('vllm')", 1),
        ("config.engine == 'other'", 0),
        ("ENGINES[config.engine].takes_url", 0),
        ("engine: str = 'hf'", 0),
        ("{'engine': 'hf'}['engine']", 0),
    ],
)
def test_which_comparisons_those_are(code, places, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(code, encoding="utf-8")
    assert len(engines_compared(file)) == places


def test_docstrings_begin_with_a_verb_or_a_noun():
    """As CONTRIBUTING.md asks: a docstring that begins with "of" or "what" has lost its subject."""
    folders = ("moe_upgrpo", "benchmarks", "docs", "examples", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 250
    lost = [
        f"{file.relative_to(ROOT)}: {said.splitlines()[0]}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(said := node.value.value, str)
        and said.split(" ")[0] in ("Of", "What")
    ]
    assert not lost, lost
