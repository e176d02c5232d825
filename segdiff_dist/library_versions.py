"""Versions of the libraries whose undocumented parts this project uses, each in one adapter.

A version outside its range may have those parts elsewhere, or with another meaning. So an adapter checks the version
here before it uses them. pyproject.toml has the same ranges for the installer.
"""

from __future__ import annotations

from importlib import metadata

from data_shards.problems import problem

SUPPORTED = {
    "deepspeed": ">=0.19,<0.20",  # training/deepspeed_internals.py
    "diffusers": ">=0.38,<0.43",  # diffusers_parts.py
}


def require_supported(library: str) -> None:
    """Raise InputProblems if the installed version is outside the tested range."""
    from packaging.specifiers import SpecifierSet

    installed = metadata.version(library)
    if not SpecifierSet(SUPPORTED[library]).contains(installed, prereleases=True):
        remedy = f"its internals differ between versions: pip install '{library}{SUPPORTED[library]}'"
        raise problem("environment", library, installed, remedy)
