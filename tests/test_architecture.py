"""The direction of the imports, and that the pure parts need nothing but torch and numpy."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
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
    "extras",
    "lazy",
    "ending",
    "heap",
    "kernels",
    "patching",
    "plugins",
    "rewards",
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
        allowed = (
            {"errors", "extras", "stats", "store", "report"} if folder == "report" else allowed
        )
        # A stack has a trainer of its own.
        allowed -= {"train", "tools", "compare"} if folder == "integrations" else set()
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"
    uses_megatron = any(name.split(".")[0] == "megatron" for name in found)
    assert not uses_megatron or folder in ("megatron", "integrations")


def test_there_are_files_to_check():
    assert len(FILES) > 30


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def at_import(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """All that runs when the module is imported."""
    for node in nodes:
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if later or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            continue
        yield node
        yield from at_import(list(ast.iter_child_nodes(node)))


def test_imports_go_round_in_no_circle():
    modules = {module(path): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        imported = set()
        for node in at_import(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports by a relative name, not looked at here"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {one if one in modules else node.module for one in full}
        graph[name] = imported & modules.keys()
    assert sum(map(len, graph.values())) > 500
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(modules)


def test_no_class_of_the_trainer_has_more_than_15_methods():
    found = {
        f"{path.name}: {node.name}": sum(
            isinstance(of, ast.FunctionDef | ast.AsyncFunctionDef) for of in node.body
        )
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] in ("train", "tools")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert len(found) > 30
    assert not {name: methods for name, methods in found.items() if methods > 15}


HTTP = {"http.client", "urllib.request", "urllib3", "requests", "httpx", "aiohttp"}


def test_one_file_asks_servers():
    asking = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == of or name.startswith(f"{of}.") for name in imports(path) for of in HTTP)
    ]
    assert asking == ["rollout/server_client.py"]


# Classes of the stacks, whose constructors take a GPU, a Ray cluster, a model or a tokenizer.
OF_STACKS = {
    *("DynamicInferenceEngine", "KVBlockAllocator", "TextGenerationController"),
    "actor_module.MegatronTrainRayActor",
    *("module.MegatronGRPOTrainer", "Template"),
}


def test_no_test_makes_an_object_of_ours_without_its_constructor():
    made = [
        ast.unparse(node.args[0])
        for path in (ROOT / "tests").rglob("*.py")
        if "__new__" in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__new__")
    ]
    assert set(made) == OF_STACKS


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
    "megatron/checkpoint_files.py": "weights_only=True",
    "megatron/groups.py": ("buffers=buffers", "piece"),  # of this job's other ranks, as in torch
    "rewards/sandbox.py": "compile(job[",  # a program to be judged, in a process that is shut in
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
    assert not unsafe and "megatron/checkpoint_files.py" in found


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
    ("finder", "code", "places"),
    [
        (without_encoding, "Path('a').read_text()", 1),
        (without_encoding, "Path('a').write_text('b', errors='replace')", 1),
        (without_encoding, "open('a')", 1),
        (without_encoding, "Path('a').open('a')", 1),
        (without_encoding, "os.fdopen(0, 'w')", 1),
        (without_encoding, "subprocess.run(['a'], text=True)", 1),
        (without_encoding, "Path('a').read_text(encoding='utf-8')", 0),
        (without_encoding, "Path('a').open('rb')", 0),
        (without_encoding, "open('a', mode='wb')", 0),
        (without_encoding, "os.open('a', os.O_RDONLY)", 0),
        (without_encoding, "write_text(file, 'a')", 0),
        (without_encoding, "subprocess.run(['a'], encoding='utf-8')", 0),
        (engines_compared, "config.engine == 'hf'", 1),
        (engines_compared, "'vllm' != config.engine", 1),
        (engines_compared, "config.engine in ('vllm', 'sglang')", 1),
        (engines_compared, "match config.engine:\n    case 'sglang' | 'other':\n        pass", 1),
        (engines_compared, "{'hf': 1, 'vllm': 2}[config.engine]", 1),
        (engines_compared, "{'hf': 1}.get(config.engine)", 1),
        (engines_compared, "config.engine.startswith('vllm')", 1),
        (engines_compared, "config.engine == 'other'", 0),
        (engines_compared, "ENGINES[config.engine].takes_url", 0),
        (engines_compared, "engine: str = 'hf'", 0),
        (engines_compared, "{'engine': 'hf'}['engine']", 0),
    ],
)
def test_which_places_are_found(finder, code, places, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(code, encoding="utf-8")
    assert len(finder(file)) == places


def test_every_file_of_the_package_names_its_license():
    """In its first line, as SPDX has it; LICENSE has the text."""
    line = "# SPDX-License-Identifier: Apache-2.0"
    files = [*PACKAGE.rglob("*.py")]
    assert len(files) > 200
    lacking = [f for f in files if f.read_text(encoding="utf-8").partition("\n")[0] != line]
    assert not lacking, f"put {line!r} first in {[str(f.relative_to(ROOT)) for f in lacking]}"


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
