"""What MkDocs does beyond docs/: pages from the repository's root, how-to pages, and a reference of every module.

The site mirrors the repository, but that docs/ is its root. So a relative link of any page is resolved to the path of a
file in the repository, and from there to the page or file of the site. A link to a file that the site does not show
(source code, a folder) becomes its text alone; a link to a file that does not exist stays, and the build fails.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from segdiff_dist.config_reference import settings_page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"),
    *("launch/cluster/README.md", "deploy/README.md", "benchmarks/results/*", "examples/*"),
)
"""Files outside of docs/ that the site shows, as patterns."""

PACKAGES = ("data_shards", "segdiff_dist", "kernels/segdiff_kernels")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, with the pages that are found rather than listed."""
    for section in config.nav or []:
        if "How-to" in section:
            section["How-to"] += [f"{path.name}" for path in sorted((ROOT / "docs").glob("add_a_*.md"))]
    reference: list[Any] = [{"Settings": "reference/settings.md"}]
    reference += [{name: f"reference/{name}.md"} for name in _modules()]
    config.nav = [*(config.nav or [])[:-1], {"Reference": reference}, *(config.nav or [])[-1:]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' hook: pages that are outside docs/, and those made from code, join the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    for name, modules in _modules().items():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference(name, modules)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """MkDocs' hook: links to files of the repository lead to their pages of the site."""
    here = page.file.src_uri
    source = here if (ROOT / here).exists() else f"docs/{here}"

    def rewrite(link: re.Match[str]) -> str:
        target = link["target"]
        if ":" in target or target.startswith("/"):
            return link[0]
        path = normpath(join(dirname(source), target))
        on_site = path.removeprefix("docs/")
        if files.get_file_from_path(on_site) is not None:
            place = relpath(on_site, dirname(here) or ".")
            return f"{link['image']}[{link['text']}]({place}{link['anchor'] or ''})"
        return link["text"] if (ROOT / path).exists() else link[0]

    return _LINK.sub(rewrite, markdown)


def _modules() -> dict[str, list[str]]:
    """By package, its own public modules; subpackages have pages of their own."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            folder = init.parent
            name = ".".join(folder.relative_to((ROOT / package).parent).parts)
            found[name] = [f"{name}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))]
    return found


def _reference(name: str, modules: list[str]) -> str:
    """A package's page: what it says of itself, then its modules."""
    parts = name.split(".")
    folder = next(ROOT / package for package in PACKAGES if package.endswith(parts[0])).joinpath(*parts[1:])
    about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return "\n\n".join([f"# {name}", about, *(f"::: {module}" for module in modules)])
