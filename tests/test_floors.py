"""The order of the modules: each imports only from floors below, and importing the package stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sthisto

ROOT = Path(sthisto.__file__).parent
FLOORS = (
    {"_files", "_messages", "_statistics"},
    {"grids", "images", "metrics", "uncertainty"},
    {"_training", "alignment"},
    {"encoders"},
    {"models", "domains", "_data"},
    {"_crossfit"},
    {"evaluation"},
    {"pp", "tl", "pl", "datasets"},
    {"", "cli", "__main__"},  # "" is the package itself, whose version the command line tells
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
TOP = len(FLOORS) - 1
SLOW = {"PIL", "anndata", "dask", "h5py", "pandas", "pooch", "requests", "scipy", "sklearn", "tifffile", "zarr"}
HEAVY = {"matplotlib", "scanpy", "spatialdata", "squidpy", "timm", "torch"}
KNOW_TORCH = {"_training", "domains", "encoders", "models"}
KNOW_ANNDATA = {"_data", "datasets", "cli", "pl"}  # cli reads files; pl names the type in its signatures
SAY_NOTHING = {"utils", "helpers", "core", "base", "common", "manager"}

FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def part_of(file: str) -> str:
    """The module at the top of the package that a file belongs to."""
    name = Path(file).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported(tree: ast.AST, *, typing: bool = True) -> Iterator[str]:
    """Dotted names that a tree imports, at any depth; without ``typing`` those for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and not typing and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here, so that they can be read"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node, typing=typing)


def own_parts(names: Iterator[str]) -> set[str]:
    """Parts of the package among imported names; what is no module belongs to the package itself."""
    inside = (name.split(".")[1:] for name in names if name.split(".")[0] == "sthisto")
    return {rest[0] if rest and rest[0] in FLOOR else "" for rest in inside}


def too_high(part: str, source: str) -> set[str]:
    """What a source in a part may not import."""
    parts = own_parts(imported(ast.parse(source))) - {part}
    return {each for each in parts if FLOOR[each] >= FLOOR[part] and not FLOOR[part] == FLOOR[each] == TOP}


def test_every_module_has_a_floor():
    assert {part_of(file) for file in FILES} <= set(FLOOR)


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_from_floors_below(file):
    assert too_high(part_of(file), FILES[file].read_text()) == set()


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("grids", "from sthisto import tl", {"tl"}),
        ("grids", "def f():\n    from sthisto.models.gp import Gp", {"models"}),
        ("grids", "import sthisto.images", {"images"}),
        ("models", "from sthisto._data import Fit", {"_data"}),
        ("_data", "from sthisto import models, grids", {"models"}),
        ("pp", "if TYPE_CHECKING:\n    from sthisto import tl", {"tl"}),
        ("tl", "from sthisto import __version__", {""}),
        ("models", "from sthisto.models import Section\nfrom sthisto import _training", set()),
        ("encoders", "from sthisto.encoders import Encoder\nimport torch", set()),
        ("cli", "from sthisto import __version__, tl", set()),
    ],
)
def test_what_goes_up_or_sideways_is_found(part, source, found):
    assert too_high(part, source) == found


@pytest.mark.parametrize(
    ("package", "knowing"), [("torch", KNOW_TORCH), ("timm", KNOW_TORCH), ("anndata", KNOW_ANNDATA)]
)
def test_who_knows_a_package(package, knowing):
    users = {
        part_of(file)
        for file, path in FILES.items()
        for name in imported(ast.parse(path.read_text()), typing=False)
        if name.split(".")[0] == package
    }
    assert users <= knowing


def test_imports_for_type_checkers_are_told_apart():
    tree = ast.parse("import numpy\nif TYPE_CHECKING:\n    import anndata")
    assert list(imported(tree)) == ["numpy", "anndata"]
    assert list(imported(tree, typing=False)) == ["numpy"]


@pytest.mark.parametrize(
    ("start", "absent"),
    [
        ("import sthisto", {*HEAVY, *SLOW, "numpy"}),
        ("from sthisto import pp, tl, pl, datasets", HEAVY),
        ("import sthisto.cli; sthisto.cli.parser()", {*HEAVY, *SLOW}),
        ("import sthisto.cli; sthisto.cli.main(['completion', 'bash'])", {*HEAVY, *SLOW}),
    ],
)
def test_importing_is_cheap(start, absent):
    """In a fresh interpreter: here, other tests have loaded everything."""
    code = f"{start}\nimport sys\nprint('loaded:', *sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_modules_are_attributes_of_the_package():
    code = "import sthisto\nfor name in sthisto.__all__: getattr(sthisto, name)\nprint(sthisto.tl.fit.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "fit\n"
    assert set(sthisto.__all__) <= set(dir(sthisto))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        sthisto.nope  # noqa: B018


@pytest.mark.parametrize("file", FILES)
def test_names_say_something(file):
    tree = ast.parse(FILES[file].read_text())
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    names = {name.strip("_").lower() for name in defined | {Path(file).stem}}
    assert not names & SAY_NOTHING
