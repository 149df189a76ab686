"""Packaging of worldr1_jax."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements() -> list[str]:
    """What requirements.txt names, comments left out."""
    lines = (
        line.split("#")[0].strip() for line in (HERE / "requirements.txt").read_text().splitlines()
    )
    return [line for line in lines if line]


setup(
    name="worldr1_jax",
    version="0.1.0",
    description="World-R1 in JAX: Flow-GRPO that teaches text-to-video models 3D geometry",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["worldr1_jax", "worldr1_jax.*"]),
    package_data={
        "worldr1_jax.nano": ["weights/*/*"],
        "worldr1_jax.data.world_prompts": ["material/*/*.txt", "checksums.json", "README.md"],
    },
    python_requires=">=3.11",
    install_requires=requirements(),
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "test": ["pytest>=8", "hypothesis>=6", "ruff>=0.6", "mypy>=1.11"],
        # Oracles. torch is pinned to a version with a CPU build. depth-anything-3, gsplat, lpips
        # and open_clip_torch are installed beside it without their dependencies (see .ci/run).
        "parity": [
            "torch==2.13.0",
            "diffusers>=0.42",
            "accelerate",
            "peft",
            "einops",
            "omegaconf",
            "addict",
            "e3nn",
            "opencv-python-headless",  # the resize of depth-anything-3
            "rich",
            "ftfy",  # the tokenizer of open_clip_torch
            "regex",
            "pytest>=8",
            "hypothesis>=6",
        ],
    },
)
