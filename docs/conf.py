"""Configuration of the documentation: ``sphinx-build -n -W -b html docs docs/_build/html``.

With ``STHISTO_DOCS_OFFLINE=1`` nothing is fetched: names of other packages are not linked.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
from pathlib import Path

import latex2mathml.converter
import matplotlib as mpl
import matplotlib.pyplot as plt
from docutils import nodes

import sthisto
from sthisto.cli._options import parser
from sthisto.domains import METHODS
from sthisto.encoders import ENCODERS
from sthisto.models import MODELS

HERE = Path(__file__).parent
mpl.use("agg")
mpl.rcParams["svg.hashsalt"] = "sthisto"  # equal figures in every build
os.environ["COLUMNS"], os.environ["NO_COLOR"] = "79", "1"  # help texts that fit the text column

project, author, copyright = "sthisto", "The sthisto developers", "The sthisto developers"
version = release = sthisto.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
nitpicky = True
exclude_patterns = ["_build", "examples", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
suppress_warnings = ["toc.empty_glob"]  # a checkout without tutorials
html_math_renderer = "mathml"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the tutorials; outputs are stored in them
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
    # types of other packages, by the short names in signatures; names of this package have to resolve
    (r"py:.*", rf"({'|'.join(OTHERS)}|np|npt|nn|pd|plt|abc|collections|typing|pathlib|os|dataclasses|PIL)(\..*)?"),
    (r"py:.*", r"(Any|ArrayLike|Axes|Callable|DataFrame|Figure|Generator|Index|Iterable|Iterator|Literal|Mapping)"),
    (r"py:.*", r"(NDArray|AnnData|GeoDataFrame|SpatialData|Path|PathLike|Picture|Protocol|Self|Sequence|Series)"),
    (r"py:.*", r"(Tensor|TypeAlias)"),
    (r"py:.*", r"(bool|bytes|dict|float|int|list|object|set|frozenset|str|tuple|type|None|optional|Ellipsis)"),
    (r"py:.*", r"(tuple|dict|list)\[.*"),
    (r"py:class", r"_data\.SpatialDataView"),  # an annotation of the tools, documented as sthisto.SpatialDataView
    (r"py:exc", r"[A-Z]\w*Error|SystemExit|\w*Warning"),
]

html_theme = "sphinx_book_theme"
html_title = "sthisto"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_theme_options = {
    "navigation_with_keys": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],  # one search field, that of the sidebar
}


def copy_tutorials(_app: object) -> None:
    """Copy the notebooks below this folder, where Sphinx expects pages."""
    shutil.rmtree(HERE / "tutorials", ignore_errors=True)
    notebooks = sorted((HERE.parent / "tutorials").glob("*.ipynb"))
    (HERE / "tutorials").mkdir()
    for notebook in notebooks:
        shutil.copy(notebook, HERE / "tutorials")


def write_help(_app: object) -> None:
    """Write what every command prints with ``--help``."""
    shutil.rmtree(HERE / "generated", ignore_errors=True)  # pages of names that no longer exist
    folder = HERE / "generated" / "cli"
    folder.mkdir(parents=True)
    whole = parser()
    commands = next(action.choices for action in whole._actions if action.dest == "command")
    for name, command in {"sthisto": whole, **commands}.items():
        with contextlib.redirect_stdout(io.StringIO()) as text:
            command.print_help()
        (folder / f"{name}.txt").write_text(text.getvalue())


def write_table(name: str, columns: list[str], rows: list[tuple[object, ...]]) -> None:
    """Write a Markdown table for inclusion in a page."""
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    (HERE / "generated" / f"{name}.txt").write_text(text + "\n")


def write_registries(_app: object) -> None:
    """Write tables of models, domain methods and encoders from their registries, and a page per model."""
    write_table(
        "models",
        ["name", "inputs", "context", "iterative", "reference"],
        [
            (
                f"{{doc}}`{name} <../generated/model_{name}>`",
                ", ".join(sorted(spec.inputs)),
                spec.context,
                "yes" if spec.iterative else "no",
                spec.reference,
            )
            for name, spec in MODELS.items()
        ],
    )
    write_table(
        "methods",
        ["name", "uses positions", "clustering", "reference"],
        [
            (f"`{name}`", "yes" if spec.spatial else "no", spec.clusters, spec.reference)
            for name, spec in METHODS.items()
        ],
    )
    write_table(
        "encoders",
        ["name", "weights on the Hub", "gated", "license", "features", "input"],
        [
            (
                f"`{name}`",
                (spec.weights or "none").replace("_", "_<wbr>"),  # may break there: some are long
                "yes" if spec.gated else "no",
                spec.license,
                spec.dim,
                f"{spec.input_size} px, {spec.patch_um:g} µm",
            )
            for name, spec in ENCODERS.items()
        ],
    )
    for name, spec in MODELS.items():
        (HERE / "generated" / f"model_{name}.md").write_text(model_page(name, *spec.source.split(":")))


def model_page(name: str, module: str, model: str) -> str:
    """Page of a model: the docstring of its module, with equations verbatim, and its settings."""
    title, _, body = inspect.cleandoc(importlib.import_module(module).__doc__ or name).partition("\n")
    blocks = []
    for block in re.split(r"\n\s*\n", body.strip("\n")):
        if block.startswith("    "):
            blocks.append("```text\n" + inspect.cleandoc(block) + "\n```")
        else:
            prose = re.sub(r":(\w+):`", r"{\1}`", block.replace("``", "`"))
            blocks.append(re.sub(r"(?<![`\w])([*~|<])", r"\\\1", prose))
    settings = f"```{{eval-rst}}\n.. autoclass:: {module}.{model}\n   :no-members:\n```"
    return "\n\n".join(["---\norphan: true\n---", f"# Model: `{name}`", title, *blocks, "## Settings", settings]) + "\n"


PROSE = "prose"  # stands for the type of a Returns section without one


def mark_prose(_app: object, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Keep napoleon from parsing prose under Returns as a type: types are in the signature already."""
    text = "\n".join(lines)
    section = re.search(r"(?ms)^(?:Returns|Yields)\n-+\n(.*?)(?=^\S[^\n]*\n-{3,}$|\Z)", text)
    if what in {"function", "method"} and section and not re.search(r"(?m)^ +\S", section[1]):
        paragraphs = [
            "- " + block.replace(" : ", ": ").replace("\n", "\n  ") if re.match(r"``[^:]* : ", block) else block
            for block in re.split(r"\n{2,}", section[1].strip())
        ]
        prose = "\n".join(f"    {line}".rstrip() for line in "\n\n".join(paragraphs).split("\n"))
        lines[:] = f"{text[: section.start(1)]}{PROSE}\n{prose}\n\n{text[section.end() :]}".split("\n")


def unmark_prose(_app: object, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Remove the mark that :func:`mark_prose` set."""
    lines[:] = [line.replace(f"*{PROSE}* -- ", "") for line in lines]


def draw_benchmarks(_app: object) -> None:
    """Draw the table of accuracy at random splits as a figure, so that both always agree."""
    head, _, *rows = re.search(r"held out at random:\n\n((?:\|.*\n)+)", (HERE / "benchmarks.md").read_text())[
        1
    ].splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    fig, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
    models = [name for name in names if name not in {"ceiling", "gene means"}]
    for number, model in enumerate(models):
        scores = [float(row[1 + names.index(model)].split("/")[0]) for row in cells]
        ax.bar([i + 0.16 * (number - 2) for i in range(len(cells))], scores, 0.15, label=model, color=f"C{number}")
    for i, row in enumerate(cells):
        ax.hlines(float(row[1 + names.index("ceiling")]), i - 0.42, i + 0.42, "0.3", "--", label="_" * i + "ceiling")
    ax.set(xticks=range(len(cells)), xticklabels=[row[0] for row in cells], ylabel="Pearson r, held-out spots")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(HERE / "generated" / "benchmarks.svg")
    plt.close(fig)


def plain_signature(
    _app: object, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show ``Annotated[int, Range(...)]`` as ``int``: the docstring states the range."""
    plain = signature and re.sub(r"(?:typing\.)?Annotated\[([\w.]+(?: \| None)?), [^\]]*\]", r"\1", signature)
    return plain, returns


class Properties:
    """Keeps napoleon from reading "Radius, pixels: ..." of a property as a type and a text."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def keep(self, _app: object, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
        """Store the lines before napoleon."""
        self.lines = list(lines) if what == "property" else []

    def restore(self, _app: object, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
        """Restore them after it."""
        if what == "property":
            lines[:] = self.lines


def mathml(latex: str, display: str) -> str:
    """Convert LaTeX to MathML, which browsers render without a script and offline."""
    latex = latex.replace(r"\!", "")  # a negative space
    if "&" in latex:
        raise ValueError(f"aligned equations are not supported, write several: {latex}")
    return latex2mathml.converter.convert(latex, display=display)


def write_inline(writer: object, node: object) -> None:
    """Render a formula in running text."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def write_block(writer: object, node: object) -> None:
    """Render a formula on a line of its own."""
    writer.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: object) -> None:
    """Generate the pages that are not written by hand."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    app.connect("builder-inited", copy_tutorials, priority=100)  # before autosummary collects pages
    app.connect("builder-inited", write_help, priority=100)
    app.connect("builder-inited", write_registries, priority=101)
    app.connect("builder-inited", draw_benchmarks, priority=101)
    app.connect("autodoc-process-docstring", mark_prose, priority=300)
    app.connect("autodoc-process-docstring", unmark_prose, priority=700)
    app.connect("autodoc-process-signature", plain_signature)
    properties = Properties()
    app.connect("autodoc-process-docstring", properties.keep, priority=400)
    app.connect("autodoc-process-docstring", properties.restore, priority=600)
