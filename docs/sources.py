"""What decides the numbers of an experiment: the code that it reaches, and a hash of that code.

From the experiment's function every name is followed through the script and the modules of this project, every class
with all its methods, and every attribute to each method of that name, whoever has it: rather too much than too little.
What only reads files, draws, prints or refuses is left out, as are comments, docstrings, annotations and white space.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("common.lab", "common.training", "common.data", "common.statistics")  # a lesson reaches them through `lab`
SHOWS = ("common.lesson", "common.plotting", "common.report")  # no number comes from there
OURS = ("common", "further", "docs", "readers", "runner")
NOTHING: frozenset[str] = frozenset()
ASSIGNMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign)
ANYWAY = "*"  # the name of what a module does when it is run, which defines nothing
SHOWN = (
    "say",
    "table",
    "sweep",
    "curves",
    "dots",
    "heat",
    "figure",
    "__init__",
    "run",
    "close",
    "is_current",
    "wait_for",
)
# What only shows results; what reads a file, which is known by its content; what only refuses.
OUTSIDE = {("common.lab", f"Lab.{name}") for name in SHOWN} | {("common.training", "Recipe.__post_init__")}
OUTSIDE |= {("common.data", name) for name in ("load", "forget", "digest")}


class Place(NamedTuple):
    """A definition: its module, and its name, `Class.method` for a method."""

    module: str
    name: str


def syntax(node: Any) -> Any:
    """A syntax tree as nested lists, the same in every version of Python: no positions, no empties."""
    if isinstance(node, list):
        return [syntax(item) for item in node]
    if isinstance(node, ast.AST):
        pairs = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *([name, syntax(value)] for name, value in pairs)]
    return repr(node)


class Prune(ast.NodeTransformer):
    """Leaves out what decides no number: docstrings, annotations and refusals; `ours` if it is this project's code."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value
        if isinstance(call, ast.Constant) and isinstance(call.value, str):
            return None
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        return None if self.ours and name.startswith("check_") else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        refuses = all(isinstance(each, ast.Raise) for each in node.body) and not node.orelse
        return None if refuses else self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def definitions(module: str, tree: ast.Module) -> Iterator[tuple[Place, list[ast.stmt]]]:
    """The definitions at a module's top level, a class divided into its methods and the rest. A name may come twice."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            for each in methods:
                yield Place(module, f"{node.name}.{each.name}"), [each]
            node.body = [each for each in node.body if each not in methods]
            yield Place(module, node.name), [node]
        elif isinstance(node, ast.FunctionDef):
            yield Place(module, node.name), [node]
        elif isinstance(node, ASSIGNMENTS):
            for name in bound(node):
                yield Place(module, name), [node]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            yield Place(module, ANYWAY), [each for each in node.body if not ast.unparse(each).endswith(".main()")]
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            yield Place(module, ANYWAY), [node]
        if isinstance(node, ast.FunctionDef) and registered(node, tree):  # something may call it by another name
            yield Place(module, ANYWAY), [node]


def registered(node: ast.FunctionDef, tree: ast.Module) -> bool:
    """Whether one of a function's decorators is the module's own, which may put the function anywhere."""
    functions = {each.name for each in tree.body if isinstance(each, (ast.FunctionDef, ast.ClassDef))}
    names = functions.union(*(bound(each) for each in tree.body if isinstance(each, ASSIGNMENTS)))
    used = {each.id for top in node.decorator_list for each in ast.walk(top) if isinstance(each, ast.Name)}
    return bool(used & names) and not is_experiment(node)


def decorated(node: ast.FunctionDef) -> bool:
    """Whether a function has a decorator, but is no experiment."""
    return bool(node.decorator_list) and not is_experiment(node)


def is_experiment(node: ast.FunctionDef) -> bool:
    """Whether a function is one of a lesson's experiments."""
    return "lesson.experiment" in map(ast.unparse, node.decorator_list)


def bound(node: ast.AST) -> list[str]:
    """The names that a statement binds or changes: `a, b = …`, `a[0] = …`, `a.b |= …`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


class Piece(NamedTuple):
    """A definition's code, hashed, and the names and the attributes in it."""

    code: str
    names: frozenset[str]
    attributes: frozenset[str]


class Module(NamedTuple):
    """The pieces of a module by name, and for each name that it imports where that stands."""

    pieces: dict[Place, Piece]
    imports: dict[str, Place]


def piece(nodes: list[ast.stmt]) -> Piece:
    """What is to be known of some code."""
    each = [node for top in nodes for node in ast.walk(top)]
    names = frozenset(node.id for node in each if isinstance(node, ast.Name))
    if nodes and isinstance(nodes[0], ast.FunctionDef):  # its own variables are no names of the module's
        names -= {node.arg for node in each if isinstance(node, ast.arg)}
        names -= {node.id for node in each if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = frozenset(node.attr for node in each if isinstance(node, ast.Attribute))
    return Piece(hashlib.sha256(json.dumps(syntax(nodes)).encode()).hexdigest(), names, attributes)


def read(module: str, text: str | bytes) -> Module:
    """A module's pieces; of two definitions of a name the last counts, of assignments all. Raises SyntaxError."""
    tree, found, imports = ast.parse(text), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {each.asname or each.name.partition(".")[0]: Place(each.name, "") for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {each.asname or each.name: Place(node.module, each.name) for each in node.names}
    for place, nodes in definitions(module, Prune(module.startswith("common.")).visit(tree)):
        adds = place.name == ANYWAY or all(isinstance(each, ASSIGNMENTS) or decorated(each) for each in nodes)
        found[place] = [*(found.get(place, []) if adds else []), *nodes]
    return Module({place: piece(nodes) for place, nodes in found.items()}, imports)


@lru_cache
def read_file(path: Path, module: str, changed: int) -> Module:
    """A module from its file, as it is since it was last `changed`."""
    return read(module, path.read_bytes())


def find(module: str, folders: Sequence[Path]) -> Module:
    """A module in one of these folders, but for those whose code decides no number; else one without pieces."""
    outside = module in SHOWS or module.partition(".")[0] in ("", "docs", "readers", "runner")
    for path in (folder.joinpath(*module.split(".")).with_suffix(".py") for folder in folders):
        if path.is_file() and not outside:
            return read_file(path, module, path.stat().st_mtime_ns)
    return Module({}, {})


def reached(name: str, script: Module, folders: Sequence[Path] = (ROOT,)) -> dict[Place, Piece]:
    """The pieces that the function `name` of a script reaches, whose imports are looked for in these folders."""
    modules = {"": script} | {each: find(each, folders) for each in ALWAYS}
    found: dict[Place, Piece] = {}
    waiting = [Place("", name), Place("", ANYWAY)]
    while waiting:
        while waiting:
            place = waiting.pop()
            if place.module not in modules:
                modules[place.module] = find(place.module, folders)
            module = modules[place.module]
            if place in found or place in OUTSIDE:
                continue
            if place in module.pieces:
                found[place] = module.pieces[place]
                waiting.append(Place(place.module, ANYWAY))
                waiting += [Place(place.module, each) for each in found[place].names]
            elif place.name in module.imports:
                waiting.append(module.imports[place.name])
            elif place.module and place.module.partition(".")[0] not in OURS:  # another package's, or a whole module
                found[place] = Piece("", NOTHING, NOTHING)
        attributes = set().union(*(each.attributes for each in found.values()))
        for each in (there for module in modules.values() for there in module.pieces):
            owner, _, method = each.name.rpartition(".")
            whole = Place(each.module, owner) in found  # a class, whose methods torch may call, or a module
            known = method in attributes and not method.startswith("__") and (owner or each.module in ALWAYS)
            if (whole or known) and each not in found and each not in OUTSIDE:
                waiting.append(each)
    return found


def sources(names: Sequence[str], text: str | bytes, folders: Sequence[Path] = (ROOT,)) -> dict[str, str]:
    """For each experiment of a script, whose source is `text`, the hash of the code that decides its numbers. Raises
    SyntaxError.
    """
    script, hashes = read("", text), {}
    for name in names:
        code = sorted((*place, each.code) for place, each in reached(name, script, folders).items())
        hashes[name] = hashlib.sha256(json.dumps(code).encode()).hexdigest()
    return hashes


def experiments_in(text: str | bytes) -> list[str]:
    """The names of a script's experiments, in order. Raises SyntaxError."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return [each.name for each in functions if is_experiment(each)]
