"""Configuration of the documentation's build."""

import eventor

project = "Eventor"
author = "The Eventor authors"
copyright = author  # noqa: A001 (Sphinx's name)
version = release = eventor.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_title = f"Eventor {version}"
