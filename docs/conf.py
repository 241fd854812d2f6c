"""How the pages are built: ``sphinx-build -n -W -b html docs docs/_build/html``.

With ``STHISTO_DOCS_OFFLINE=1`` nothing is fetched: names of other packages are not linked.
"""

import contextlib
import io
import os
import shutil
from pathlib import Path

import sthisto
from sthisto.cli._options import parser
from sthisto.domains import METHODS
from sthisto.encoders import ENCODERS
from sthisto.models import MODELS

HERE = Path(__file__).parent
os.environ["COLUMNS"], os.environ["NO_COLOR"] = "88", "1"  # of the help texts

project, author, copyright = "sthisto", "The sthisto developers", "The sthisto developers"
version = release = sthisto.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
nitpicky = True
exclude_patterns = ["_build", "examples", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
suppress_warnings = ["toc.empty_glob"]  # a checkout without tutorials

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests run the tutorials; what they printed is kept in them
nb_merge_streams = True
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_preprocess_types = False
napoleon_use_rtype = False
napoleon_use_param = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

OTHERS = {
    "python": "https://docs.python.org/3",
    "anndata": "https://anndata.readthedocs.io/en/stable",
    "matplotlib": "https://matplotlib.org/stable",
    "numpy": "https://numpy.org/doc/stable",
    "pandas": "https://pandas.pydata.org/docs",
    "scanpy": "https://scanpy.readthedocs.io/en/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
    "spatialdata": "https://spatialdata.scverse.org/en/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
}
offline = bool(os.environ.get("STHISTO_DOCS_OFFLINE"))
intersphinx_mapping = {} if offline else {name: (url, None) for name, url in OTHERS.items()}
nitpick_ignore_regex = [
    # types of other packages, by the short names that signatures show; names of this one have to be found
    (r"py:.*", rf"({'|'.join(OTHERS)}|np|npt|nn|pd|plt|collections|typing|pathlib|os|dataclasses|PIL)(\..*)?"),
    (r"py:.*", r"(Any|ArrayLike|Axes|Callable|DataFrame|Figure|Generator|Index|Iterable|Iterator|Literal|Mapping)"),
    (r"py:.*", r"(NDArray|AnnData|SpatialData|Path|PathLike|Picture|Protocol|Self|Sequence|Series|Tensor|TypeAlias)"),
    (r"py:.*", r"(bool|bytes|dict|float|int|list|object|set|frozenset|str|tuple|type|None|optional|Ellipsis)"),
    (r"py:.*", r"(tuple|dict|list)\[.*"),
    (r"py:exc", r"[A-Z]\w*Error|SystemExit|\w*Warning"),
]

html_theme = "sphinx_book_theme"
html_title = "sthisto"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_theme_options = {"navigation_with_keys": False, "show_navbar_depth": 1, "show_toc_level": 2}


def copy_tutorials(_app: object) -> None:
    """Copy the notebooks, which live beside the package where people look, to below this folder, as pages need."""
    shutil.rmtree(HERE / "tutorials", ignore_errors=True)
    notebooks = sorted((HERE.parent / "tutorials").glob("*.ipynb"))
    (HERE / "tutorials").mkdir()
    for notebook in notebooks:
        shutil.copy(notebook, HERE / "tutorials")


def write_help(_app: object) -> None:
    """Keep what every command says of itself now."""
    shutil.rmtree(HERE / "generated", ignore_errors=True)  # pages of names that are gone
    folder = HERE / "generated" / "cli"
    folder.mkdir(parents=True)
    whole = parser()
    commands = next(action.choices for action in whole._actions if action.dest == "command")
    for name, command in {"sthisto": whole, **commands}.items():
        with contextlib.redirect_stdout(io.StringIO()) as text:
            command.print_help()
        (folder / f"{name}.txt").write_text(text.getvalue())


def write_registries(_app: object) -> None:
    """Make tables of what is found by name, from the registries themselves."""
    models = [
        f"| `{name}` | {', '.join(sorted(spec.inputs))} | {spec.context} | {'yes' if spec.iterative else 'no'} "
        f"| {spec.reference} |"
        for name, spec in MODELS.items()
    ]
    head = "| name | reads | context | epochs | reference |\n|---|---|---|---|---|\n"
    (HERE / "generated" / "models.txt").write_text(head + "\n".join(models) + "\n")
    methods = [
        f"| `{name}` | {'yes' if spec.spatial else 'no'} | {spec.clusters} | {spec.reference} |"
        for name, spec in METHODS.items()
    ]
    head = "| name | looks at positions | clusters | reference |\n|---|---|---|---|\n"
    (HERE / "generated" / "methods.txt").write_text(head + "\n".join(methods) + "\n")
    encoders = [
        f"| `{name}` | {spec.weights or 'none'} | {'yes' if spec.gated else 'no'} | {spec.license} | {spec.dim} "
        f"| {spec.field} px, {spec.patch_um:g} um | {spec.reference} |"
        for name, spec in ENCODERS.items()
    ]
    head = "| name | weights on the Hub | gated | license | features | input | reference |\n"
    (HERE / "generated" / "encoders.txt").write_text(
        head + "|---|---|---|---|---|---|---|\n" + "\n".join(encoders) + "\n"
    )


class Properties:
    """Keeps napoleon from reading "Radius, pixels: ..." of a property as a type and a text."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def keep(self, _app: object, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
        """Remember the lines before napoleon."""
        self.lines = list(lines) if what == "property" else []

    def restore(self, _app: object, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
        """Put them back after it."""
        if what == "property":
            lines[:] = self.lines


def setup(app: object) -> None:
    """Make the pages that are not written by hand."""
    app.connect("builder-inited", copy_tutorials, priority=100)  # before autosummary looks for pages
    app.connect("builder-inited", write_help, priority=100)
    app.connect("builder-inited", write_registries, priority=101)
    properties = Properties()
    app.connect("autodoc-process-docstring", properties.keep, priority=400)
    app.connect("autodoc-process-docstring", properties.restore, priority=600)
