"""`python -m bench.pages`: fill the marked regions of pages in docs/ from the files of bench/results/.

What stands between `<!-- rows: NAME -->` and `<!-- end -->` is written here, from the newest file of rows of its kind;
edits by hand are lost. The prose around it is written by hand. `--check` writes nothing and fails if a page is not what
the rows say.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.pages import kernels, methods, performance, photographs, ranks, toys
from bench.pages.regions import fill, read_results
from engine.configuration.command import Parser, run_command
from engine.support.errors import InputError
from engine.support.files import write_atomically

ROOT = Path(__file__).parents[2]
PAGES = ("performance.md", "kernels.md", "methods.md", "games.md", "photographs.md", "toys.md")
TABLES = {
    **performance.TABLES,
    **kernels.TABLES,
    **methods.TABLES,
    **photographs.TABLES,
    **ranks.TABLES,
    **toys.TABLES,
}


def write(name: str, results: Path) -> str:
    """The body of the region `name`, from files in the folder `results`; InputError if there is no such region."""
    if name not in TABLES:
        raise InputError("page", f"{name!r} is no table; there are {', '.join(TABLES)}")
    kind, writer = TABLES[name]
    return writer(read_results(results, kind))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(
        prog="python -m bench.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing; exit code 1 if a page is not what the rows say")
    add("--docs", type=Path, metavar="DIR", default=ROOT / "docs", help="the pages (default: docs/)")
    add(
        "--results", type=Path, metavar="DIR", default=ROOT / "bench/results", help="the rows (default: bench/results/)"
    )
    args = parser.parse_args(argv)
    stale = []
    for page in PAGES:
        path = args.docs / page
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError("docs", f"{path}: {error.strerror}") from None
        filled = fill(text, lambda name: write(name, args.results))
        if filled == text:
            continue
        stale.append(page)
        if not args.check:
            write_atomically(path, filled.encode())
            print(path)
    if args.check and stale:
        print(f"not what the rows say: {', '.join(stale)}; run python -m bench.pages", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
