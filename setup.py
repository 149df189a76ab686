"""Where the packages lie; all other metadata is in pyproject.toml.

A wheel carries the launchers and the configs inside the package, as worldr1_jax/launch and
worldr1_jax/configs, so that `python -m worldr1_jax train` needs no checkout. They are the files of
launch/ and configs/, not copies.
"""

from setuptools import find_packages, setup

OUTSIDE = {"worldr1_jax.launch": "launch", "worldr1_jax.configs": "configs"}

setup(
    packages=[*find_packages(include=["worldr1_jax", "worldr1_jax.*"]), *OUTSIDE],
    package_dir=OUTSIDE,
)
