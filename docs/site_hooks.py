"""What MkDocs does to the pages besides rendering them: the README as a page, links to sources, and the API's names.

The pages are written to be read in the repository, too, where links like `../engine/train.py` work. A site has no such
files, so these links become their text.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]*)(?P<anchor>#[^)\s]*)?\)")
_IMAGE = re.compile(r"(!\[[^\]]*\])\(docs/([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the README as readme.md."""
    text = _IMAGE.sub(r"\1(\2)", (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "readme.md", content=_site_links(text, ROOT)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links for the site; on the API page, the names to document."""
    if page.file.src_uri == "api.md":
        markdown = fill_api(markdown)
    return markdown if page.file.src_uri == "readme.md" else _site_links(markdown, ROOT / "docs")


def _site_links(markdown: str, folder: Path) -> str:
    """Relative links of a page in `folder`: to the site's pages, or to nowhere where they lead out of docs/."""

    def replace(link: re.Match[str]) -> str:
        if not link["path"]:
            return link[0]
        target = Path(os.path.normpath(folder / link["path"]))
        if not target.exists():
            raise PluginError(f"{link[0]}: {link['path']} does not exist")
        anchor = link["anchor"] or ""
        if target == ROOT / "README.md":
            return f"[{link['text']}](readme.md{anchor})"
        if target.is_relative_to(ROOT / "docs") and target.is_file():
            return f"[{link['text']}]({target.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        return link["text"]

    # Code is left as it is.
    parts = re.split(r"(^```.*?^```|^(?: {4}[^\n]*\n)+)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else _LINK.sub(replace, part) for number, part in enumerate(parts))


def fill_api(markdown: str) -> str:
    """The API page with a directive for every public name, read from the sources."""
    lists: dict[str, Callable[[], Iterator[str]]] = {
        "public names": public_names,
        "distances": lambda: room("engine/comparison/distances"),
        "games": lambda: room("engine/comparison/games"),
        "protocols": protocols,
        "kernels": lambda: iter(["kernels"]),
    }
    for name, names in lists.items():
        marker = f"<!-- api: {name} -->"
        if marker not in markdown:
            raise PluginError(f"api.md: has no {marker}")
        markdown = markdown.replace(marker, "\n\n".join(f"::: {each}" for each in names()))
    return markdown


def _homes() -> dict[str, str]:
    """`engine._HOMES`: the module of every public name."""
    for node in ast.parse((ROOT / "engine/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOMES":
            return ast.literal_eval(node.value)
    raise PluginError("engine/__init__.py: has no _HOMES")


def public_names() -> Iterator[str]:
    """The names that `engine` exports, in full."""
    return (f"{module}.{name}" for name, module in sorted(_homes().items(), key=lambda home: home[0].lower()))


def room(folder: str) -> Iterator[str]:
    """All modules of a folder but those of the public names and the protocols, which have sections of their own."""
    for path in sorted((ROOT / folder).rglob("[a-z]*.py")):
        module = _module(path)
        if module not in _homes().values() and path.name != "protocols.py":
            yield module


def protocols() -> Iterator[str]:
    """Whole modules called protocols.py, and the protocols of other modules; pretraining's are its own business."""
    for path in sorted((ROOT / "engine").rglob("*.py")):
        if path.parent.name == "pretraining":
            continue
        if path.name == "protocols.py":
            yield _module(path)
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and "Protocol" in bases:
                yield f"{_module(path)}.{node.name}"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)
