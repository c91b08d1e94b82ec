"""What a Markdown page of this repository refers to, and whether that exists. Reads sources and imports nothing."""

from __future__ import annotations

import ast
import functools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The repository's folders that a page may name a path or a module in.
FOLDERS = ("engine", "kernels", "pipelines", "bench", "tests", "docs", "examples")
_FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)*)`")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]")
_MODULE = re.compile(r"(?:python3?|torchrun[^|]*?) -m ([\w.]+)")
_DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS[:4])})(?:\.\w+)+")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
# Modules that come with others' packages, and flags that belong to others' programs.
_OTHERS_MODULES = {"pytest", "pip", "venv"}
_OTHERS_FLAGS = {
    *("--input1", "--input2", "--strict", "--capture", "--benchmark-only"),
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-conf", "--signals-to-handle"),
    *("--shutdown-timeout", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--requeue"),
    "--open-mode",
}


def pages() -> list[Path]:
    """All pages written by people for people."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(found)


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links that lead nowhere: to no file, to no heading, or to a name that the file does not define."""
    text = page.read_text(encoding="utf-8")
    problems = []
    for label, target in _links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in headings(file.read_text(encoding="utf-8")):
            problems.append(f"{target}: no such heading")
        elif label and file.suffix == ".py" and not _names_file_or_symbol(label, file, root):
            problems.append(f"{target}: does not define {label}")
    return problems


def _links(text: str) -> Iterator[tuple[str | None, str]]:
    """(the link's text if it is code and nothing else, target) of all links and pictures outside code."""
    prose = _FENCE.sub("", text)
    for match in _LINK.finditer(prose):
        label = re.fullmatch(r"`([^`]+)`", match[1] or "")
        yield (label[1] if label else None), next(group for group in match.groups()[1:] if group is not None)


def headings(text: str) -> set[str]:
    """Anchors that GitHub and MkDocs both give to a page's headings."""
    titles = [re.sub(r"[`*]", "", title) for title in _HEADING.findall(_FENCE.sub("", text))]
    github = {re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", title.lower())) for title in titles}
    ascii_titles = [unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode() for title in titles]
    mkdocs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in ascii_titles}
    return github & mkdocs


def _names_file_or_symbol(label: str, file: Path, root: Path) -> bool:
    module = ".".join(file.relative_to(root).with_suffix("").parts)
    if "/" in label or label.endswith(".py"):
        return file.as_posix().endswith(label)
    return label == module or _defines(file, label.split("(")[0])


def missing_references(page: Path) -> list[str]:
    """Paths, modules, dotted names, flags and make targets in the code of a page that do not exist."""
    problems: list[str] = []
    for code in _code(page.read_text(encoding="utf-8")):
        problems += [f"{path}: no such path" for path in _PATH.findall(code) if not (ROOT / path).exists()]
        modules = [name for name in _MODULE.findall(code) if name not in _OTHERS_MODULES]
        problems += [f"{name}: no such command" for name in modules if not _is_command(name)]
        problems += [f"{name}: no such name" for name in _DOTTED.findall(code) if not resolves(name)]
        if code.startswith("--") or any(name.startswith(("engine.", "bench.")) for name in modules):
            unknown = set(_FLAG.findall(code)) - flags() - _OTHERS_FLAGS
            problems += [f"{flag}: no such flag" for flag in sorted(unknown)]
        if (target := re.match(r"make ([\w-]+)", code)) and not re.search(
            rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE
        ):
            problems.append(f"make {target[1]}: no such target")
    return problems


def _code(text: str) -> Iterator[str]:
    """Every line of a code block, continued lines joined, without comments; and every inline piece of code."""
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.split("  #")[0].strip()
    for span in _SPAN.findall(_FENCE.sub("", text)):
        yield " ".join(span.split())


def _is_command(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, a folder of modules, or a name (of a class's member) in a module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if not file.exists():
            continue
        return count == len(parts) or _defines(file, ".".join(parts[count:]))
    return False


def _defines(file: Path, name: str) -> bool:
    first, _, rest = name.partition(".")
    known = _definitions(file)
    return first in known and (not rest or rest in known[first])


@functools.cache
def _definitions(file: Path) -> dict[str, set[str]]:
    """Names of a module, imported ones and keys of its dicts of strings included, each with its members' names."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = set(_assigned(node)) if isinstance(node, ast.ClassDef) else set()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update({alias.asname or alias.name: set() for alias in node.names})
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({target.id: set() for target in targets if isinstance(target, ast.Name)})
            if isinstance(node.value, ast.Dict):
                keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                found.update({str(key): set() for key in keys})
    return found


def _assigned(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            yield inner.target.id
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr


@functools.cache
def flags() -> set[str]:
    """Every flag of the engine's and the benchmarks' commands: in a string, or the field of a group of settings."""
    found: set[str] = {"--help"}
    for file in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"[\"'](--[a-z][a-z0-9-]+)[\"']", text))
        if file.parent.name == "configuration":
            fields = {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", text, re.MULTILINE)}
            found |= {f"--{field}" for field in fields} | {f"--no-{field}" for field in fields}
    return found
