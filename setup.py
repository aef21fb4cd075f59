"""Packaging metadata; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (HERE / "mctd_diffusers/__init__.py").read_text("utf-8"),
    re.MULTILINE,
).group(1)

# Ranges, for those who install the package beside their own things; constraints.txt holds the exact
# versions that `make demo` and `make test` install.
INSTALL_REQUIRES = [
    "torch>=2.5",
    "diffusers>=0.35",
    "transformers>=4.56",
    "accelerate>=1.0",
    "datasets>=4.0",
    "huggingface-hub>=0.34",
    "POT>=0.9.5",
    "numpy>=1.26",
    "pillow>=10.0",
    "safetensors>=0.4.3",
    "jaxtyping>=0.3",
    "matplotlib>=3.8",
    "typer>=0.12",
    "tqdm>=4.66",
]
EXTRAS_REQUIRE = {
    # To make the model in the box again, or to train on pictures of your own.
    "training": ["resvg-py>=0.1", "tensorboard>=2.16"],
    # To run the tests and the checks. Linters are exact: a new one brings new complaints.
    "dev": [
        "beartype>=0.20",
        "hypothesis>=6.100",
        "mypy==2.4.1",
        "peft>=0.15",  # what diffusers loads LoRA with
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "ruff==0.17.6",
        "scipy>=1.12",
        "torchsde>=0.2.6",  # what two schedulers of diffusers draw their noise with
    ],
}

setup(
    name="mctd-diffusers",
    version=VERSION,
    description="Monte Carlo tree search over denoising for diffusers, guided by any reward",
    long_description=(HERE / "README.md").read_text("utf-8")
    if (HERE / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    packages=[
        *find_packages(include=["mctd_diffusers", "mctd_diffusers.*"]),
        "mctd_diffusers._training",
    ],
    # The training scripts ship in the wheel, to be launched by path through `accelerate launch`.
    package_dir={"mctd_diffusers._training": "training"},
    package_data={
        "mctd_diffusers": [
            "py.typed",
            "embedded/**",
            "embedded/**/*",
            "evaluation/*.json",
            "evaluation/*.png",
            "evaluation/prompts/*.json",
        ],
        "mctd_diffusers._training": ["*.py", "*.md", "*.json"],
    },
    entry_points={"console_scripts": ["mctd = mctd_diffusers.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
