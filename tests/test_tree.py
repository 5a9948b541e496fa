"""How the source tree hangs together: what stands on what, and that names say one thing only."""

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.flower_processes import REPOSITORY

# From the ground up: each imports only what comes before it. Nothing in flsplit knows a method.
LAYERS = (
    *(
        "errors",
        "command_errors",
        "log",
        "finite",
        "nested",
        "untrained",
        "seeds",
        "snapshots",
        "flower_internals",
        "vision",
        "losses",
        "optimizers",
    ),
    *(
        "cut",
        "client_parts",
        "account",
        "wire",
        "message",
        "auxiliary",
        "storage",
        "client",
        "carry",
        "app",
    ),
    *(
        "server",
        "wireless",
        "run",
        "privacy",
        "processes",
        "bench",
        "__init__",
        "cli",
        "__main__",
        "strategies",
    ),
)

# However they are written; "psl" is in the names of three.
METHODS = re.compile(
    "psl|sglr|splitfed|fsl[-_ ]?sage|cse[-_ ]?fsl|cycle[-_ ]?sl|sfl[-_ ]?ga|sequential[-_ ]?sl",
    re.IGNORECASE,
)


def source_files():
    """Return the path of each source file by the dotted name of its module."""
    found = {}
    for top, package in (("flsplit", "flsplit"), ("strategies", "flsplit.strategies")):
        for path in sorted((REPOSITORY / top).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / top).with_suffix("").parts
            if top == "flsplit" and parts[0] == "strategies":
                continue  # a link to the other folder
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


FILES = source_files()


@cache
def parsed(module):
    return ast.parse(FILES[module].read_text())


def modules_imported(node):
    """Return the modules of flsplit that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in FILES]
    if not (isinstance(node, ast.ImportFrom) and node.module in FILES):
        return []
    parts = [f"{node.module}.{alias.name}" for alias in node.names]
    modules = [part for part in parts if part in FILES]
    return modules if len(modules) == len(parts) else [node.module, *modules]


def imports(module):
    """Return what a module imports of flsplit, also in functions and for types alone."""
    return {one for node in ast.walk(parsed(module)) for one in modules_imported(node)}


def layer(module):
    return module.split(".")[1] if "." in module else "__init__"


def refuse_repeated(places):
    repeated = [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]
    assert not repeated, "\n".join(repeated)


def test_every_folder_has_its_place():
    assert {layer(module) for module in FILES} <= set(LAYERS)


def test_nothing_imports_what_stands_above_it():
    rank = {name: number for number, name in enumerate(LAYERS)}
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if layer(other) != layer(module) and rank[layer(other)] > rank[layer(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    sorter = TopologicalSorter({module: imports(module) - {module} for module in FILES})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_nothing_of_flsplit_is_imported_for_types_alone():
    """Such an import hides a circle; what loads its names lazily (an __init__) hides none."""
    wrong = [
        f"{module}, line {node.lineno}"
        for module, path in FILES.items()
        if path.stem != "__init__"
        for branch in ast.walk(parsed(module))
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
        if modules_imported(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_files_have_the_same_name():
    places = defaultdict(list)
    for path in FILES.values():
        if path.stem != "__init__":
            places[path.stem].append(str(path.relative_to(REPOSITORY)))
    refuse_repeated(places)


def test_no_two_scripts_of_the_apps_have_the_same_name():
    # They import their neighbours by bare names, so that one would hide the other in one process.
    places = defaultdict(list)
    for path in sorted(REPOSITORY.glob("apps/*/*.py")):
        places[path.stem].append(str(path.relative_to(REPOSITORY)))
    refuse_repeated(places)


def test_no_two_classes_have_the_same_name():
    places = defaultdict(list)
    for module in FILES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    refuse_repeated(places)


def test_no_method_is_named_outside_of_strategies():
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for module, path in FILES.items()
        if layer(module) != "strategies"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if METHODS.search(line)
    ]
    assert not wrong, "\n".join(wrong)
