"""Where a lesson runs: from a file, or in the cells of a notebook."""

import ast
import sys
import tokenize
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    return "ipykernel" in sys.modules


class Script(NamedTuple):
    """A script that runs: its file, and the text that it had when it began."""

    path: Path
    text: str


def file_of(function: Callable[..., Any]) -> Path:
    """Where a function stands, decorated or not: a file, or a name of a notebook's or a console's for what is none."""
    return Path(unwrap(function).__code__.co_filename).absolute()


def script_of(experiment: Callable[..., Any]) -> Script | None:
    """The script that an experiment stands in; None for a cell of a notebook, a console or standard input."""
    path = file_of(experiment)
    if in_cell(experiment) or not path.is_file():
        return None
    with tokenize.open(path) as file:
        return Script(path, file.read())


def in_cell(function: Callable[..., Any]) -> bool:
    """Whether a function was defined in a cell of a notebook, not in a file that a notebook runs or imports. For a
    debugger the kernel writes its cells to files, too.
    """
    path = file_of(function)
    return in_notebook() and (not path.is_file() or path.parent.name.startswith("ipykernel_"))


def cells() -> str:
    """The definitions in a notebook's cells, as they were last run."""
    from IPython import get_ipython  # there is a kernel

    shell, parts = get_ipython(), []
    for cell in shell.user_ns["In"] if shell else []:
        try:
            tree = ast.parse(shell.transform_cell(cell))
        except SyntaxError:  # nor did it run
            continue
        parts += [ast.unparse(node) for node in tree.body if not isinstance(node, (ast.Expr, ast.If, ast.For))]
    latest = dict.fromkeys(reversed(parts))  # a cell that is run again counts once
    return "\n".join(reversed(latest))
