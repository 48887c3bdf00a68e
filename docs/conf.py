"""Sphinx: `sphinx-build -W -b html docs docs/_build`."""

import re
from pathlib import Path

_INIT = Path(__file__).parents[1] / "wstunnel" / "__init__.py"

project = "wstunnel"
author = "The wstunnel developers"
copyright = "The wstunnel developers. Apache-2.0"  # noqa: A001  # Sphinx's name
release = re.findall(r'^__version__ = "(.+)"$', _INIT.read_text(encoding="utf-8"), re.MULTILINE)[0]

extensions = ["myst_parser"]
exclude_patterns = ["_build", "changelog.d", "benchmarks/results.md"]
nitpicky = True
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"wstunnel {release}"
