"""The documentation covers everything that is public, and its examples run."""

import doctest
import importlib
import inspect
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import sthisto
from sthisto.cli._options import parser
from sthisto.encoders import ENCODERS
from sthisto.models import MODELS

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="only the package is here, without its documentation")

PUBLIC = [each.name for each in pkgutil.iter_modules(sthisto.__path__) if not each.name.startswith("_")]
MODULES = [
    module.name for module in pkgutil.walk_packages(sthisto.__path__, "sthisto.") if "__main__" not in module.name
]
COMMANDS = next(action.choices for action in parser()._actions if action.dest == "command")


def module_of(name):
    return importlib.import_module(f"sthisto.{name}")


def public_names(module):
    """Names in ``__all__``, or else what the module defines without an underscore."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    defined = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    registries = {name for name, value in vars(module).items() if name.isupper() and isinstance(value, dict)}
    return defined | registries


def documented_names(module):
    """Names on the API page of a module: in its autosummary lists, described by hand, or linked to another page."""
    page = (DOCS / "api" / f"{module}.md").read_text()
    lists = "".join(re.findall(r"autosummary::\n(.*?)```", page, re.S))
    listed = set(re.findall(r"^   (\w+)$", lists, re.M))
    linked = set(re.findall(r"\{class\}`sthisto\.\w+\.(\w+)`", page))
    return listed | linked | set(re.findall(r"py:data:: (\w+)", page))


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_page(module):
    missing = public_names(module_of(module)) - documented_names(module)
    assert not missing, f"add to docs/api/{module}.md: {sorted(missing)}"


@pytest.mark.parametrize("module", PUBLIC)
def test_api_pages_list_no_name_that_is_gone(module):
    gone = {name for name in documented_names(module) if not hasattr(module_of(module), name)}
    assert not gone, f"take from docs/api/{module}.md: {sorted(gone)}"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_functions_have_docstrings_with_examples(module):
    for name in sorted(public_names(module_of(module))):
        value = getattr(module_of(module), name)
        if inspect.isfunction(value):
            assert value.__doc__, f"sthisto.{module}.{name} has no docstring"
            if module in {"pp", "tl", "pl", "datasets"}:
                assert ">>> " in value.__doc__, f"sthisto.{module}.{name} has no example"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("default")
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0


def test_pages_and_figures_that_are_linked_exist():
    for page in DOCS.rglob("*.md"):
        if {"_build", "generated", "tutorials"} & set(page.relative_to(DOCS).parts):
            continue
        for target in re.findall(r"\{doc\}`(?:[^<`]*<)?([^>`]+)>?`", page.read_text()):
            path = (page.parent / target).resolve()
            notebook = DOCS.parent / path.relative_to(DOCS).with_suffix(".ipynb")
            assert path.with_suffix(".md").exists() or notebook.exists(), f"{page.relative_to(DOCS)}: {target}"
        for picture in re.findall(r"```\{figure\} (\S+)", page.read_text()):
            if not picture.startswith("generated/"):  # drawn by the build
                assert (page.parent / picture).stat().st_size < 200_000, picture


def test_every_command_is_on_the_command_line_page():
    page = (DOCS / "cli.md").read_text()
    shown = set(re.findall(r"literalinclude\} generated/cli/([\w-]+)\.txt", page))
    assert shown == {"sthisto", *COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option(command):
    """The page contains what --help prints."""
    text = COMMANDS[command].format_help()
    for action in COMMANDS[command]._actions:
        assert action.help, f"{command}: {action.dest} has no help"
        for option in action.option_strings:
            assert option in text


def test_commands_of_the_cluster_example_parse():
    """As Snakemake runs them, with files for wildcards; the input of each rule is the output of another."""
    rules = (DOCS / "examples" / "Snakefile").read_text()
    commands = re.findall(r'^\s+"(sthisto .*)"$', rules, re.M)
    assert len(commands) == 3
    for command in commands:
        typed = command.partition(">")[0].partition(" 2>")[0].removesuffix(" 2")
        arguments = shlex.split(typed.format(input="a.h5ad", output="b.h5ad", log="a.log"))
        assert parser().parse_args(arguments[1:]).output == Path("b.h5ad")
    outputs = set(re.findall(r'output:\n\s+"(.+)",', rules))
    assert set(re.findall(r'input:\n\s+"(.+)",', rules)) < outputs
    assert re.search(r'expand\("(.+?)"', rules)[1] in outputs


def test_encoders_and_models_are_in_the_guide_and_the_references():
    page, papers = (DOCS / "howto" / "encoder.md").read_text(), (DOCS / "references.bib").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)`[^|]*\| ([^|]*)", page, re.M))
    assert set(rows) == set(ENCODERS)
    for name, weights in rows.items():
        known = ENCODERS[name].weights or "none"
        assert known.startswith(weights.strip().rstrip("…"))
    keys = set(re.findall(r"^@\w+\{(\w+),", papers, re.M))
    assert set(MODELS) - {"attention", "ridge", "gp"} <= keys
    assert {"hest", "rasmussen2006"} <= keys  # of ridge and gp


def test_cited_papers_are_known_and_known_papers_have_a_year():
    papers = (DOCS / "references.bib").read_text()
    keys = re.findall(r"^@\w+\{(\w+),", papers, re.M)
    assert len(keys) == len(set(keys)) == len(re.findall(r"year = \{\d{4}\}", papers))
    cited = {
        key.strip()
        for page in DOCS.rglob("*.md")
        for keys_of in re.findall(r"\{cite(?::t)?\}`([^`]+)`", page.read_text())
        for key in keys_of.split(",")
    }
    assert cited <= set(keys)


def test_notebooks_contain_their_outputs():
    for notebook in sorted((DOCS.parent / "tutorials").glob("*.ipynb")):
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert any(cell["outputs"] for cell in cells), f"{notebook.name} has no outputs"
        errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors, notebook.name


WORDS = (
    r"foretell\w*|foretold|anew|alike|kin|kinship|stranger\w*|beside|believ\w*|judg\w*|trust|witness\w*"
    r"|learnt|mend\w*"
)


def test_pages_use_the_standard_terms():
    """Words of an earlier private vocabulary, which design.md replaced by the field's own."""
    pages = [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]
    for page in pages:
        if {"_build", "generated", "tutorials"} & set(page.parts):
            continue
        found = re.findall(rf"\b(?:{WORDS})\b", page.read_text(), re.I)
        assert not found, f"{page.name}: {sorted(set(found))}"
