"""The options of every command."""

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from sthisto import __version__
from sthisto.cli._job import FEATURES, MODEL, N_GENES, SECTION, Job
from sthisto.encoders import ENCODERS
from sthisto.models import MODELS

EVALUATED = ("attention", "gp", "ridge", "idw")
DEVICES = "cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
SECTION_HELP = "AnnData with obsm['spatial'] (h5ad or zarr), or an output folder of Space Ranger"
SHELLS = ("bash", "zsh", "tcsh")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sthisto: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sthisto",
        description="Dense spatial gene expression from histology.",
        epilog="Start with 'sthisto demo'. On your own section, 'sthisto upsample' does all the steps at once:\n"
        "  sthisto upsample SECTION.h5ad --image SECTION.jpg -o dense.h5ad",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sthisto {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="run the whole job on a synthetic section",
        description="Make a synthetic section, hide half of its spots, predict them, print the accuracy next to "
        "inverse-distance weighting, then write the dense map of all spots and a picture of it.",
    )
    _add_demo(demo)
    for name, add, summary in (
        ("check", _add_check, "report everything known of a section, and what contradicts what"),
        ("check-alignment", _add_check_alignment, "check from the data whether the spots are registered to the image"),
        ("align", _add_align, "register the spots to the image"),
        ("features", _add_features, "extract image features around every spot"),
        ("fit", _add_fit, "fit a model of expression on the tissue and the neighboring spots"),
        ("upsample", _add_upsample, "predict expression on a dense grid, with all steps before"),
        ("evaluate", _add_evaluate, "hide spots, predict them, and compare models"),
    ):
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("section", type=Path, metavar="SECTION", help=SECTION_HELP)
        add(command)
    batch = commands.add_parser(
        "batch",
        help="fit all measured sections of a sheet together, and predict every section densely",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_batch(batch)
    completion = commands.add_parser(
        "completion",
        help="print the shell completion script",
        description='Print a script for the shell. In its start file: eval "$(sthisto completion bash)"',
    )
    completion.set_defaults(run="_options:run_completion")
    completion.add_argument("shell", choices=SHELLS, help="the shell that is to evaluate it")
    for command in commands.choices.values():
        output = command.add_argument_group("output options")
        output.add_argument("--json", action="store_true", help="print the summary as JSON")
        output.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")
        output.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run="_commands:run_demo")
    command.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)"
    )
    command.add_argument("--seed", type=int, metavar="N", help="of the section and all that follows (default 0)")
    command.add_argument(
        "--device", type=_device, metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )


def _add_check(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Read a section and report the array, the scale and where it is from, the image, whether the spots are on\n"
        "tissue, the state of X, and features and fits. Exit code 1 where facts contradict each other."
    )
    command.set_defaults(run="_commands:run_check")
    command.add_argument("--image", action="append", metavar="FILE", help="image that the coordinates refer to")
    command.add_argument("--library-key", metavar="COLUMN", help="obs column that names the section of each spot")
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the spots over the tissue")


def _add_check_alignment(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Compare how well the image predicts expression where the spots are with all flips and turns,\n"
        "and with shifts, rotations and scales. Exit code 1 where a section is misaligned."
    )
    command.set_defaults(run="_alignment:run_check_alignment")
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the statistic and the spots")
    _add_alignment_options(command)


def _add_align(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Correct obsm['spatial'] by the transformation that check-alignment finds; the former positions\n"
        "are kept in obsm['spatial_before_align']. Refused where the check is undecidable."
    )
    command.set_defaults(run="_alignment:run_align")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.h5ad", help="section, corrected")
    command.add_argument("--refine", action="store_true", help="also a smooth deformation, where it helps")
    command.add_argument("--force", action="store_true", help="apply the best transformation whatever the verdict")
    _add_alignment_options(command)


def _add_alignment_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--image", action="append", metavar="FILE", help="image that the coordinates refer to")
    command.add_argument("--library-key", metavar="COLUMN", help="obs column that names the section of each spot")
    command.add_argument("--mpp", type=float, metavar="UM", help="micrometers per full-resolution pixel")
    command.add_argument("--pitch-um", type=float, metavar="UM", help="micrometers between neighboring spots")
    command.add_argument("--genes", metavar="NAMES|FILE", help="genes to compare by (default: the most variable)")
    command.add_argument("--layer", metavar="NAME", help="layer with log-normalized expression (default: X)")


def _add_features(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Cut a patch of the image at every spot, encode it, and write the section with the\n"
        f"features in obsm['{FEATURES}']. The expression is left as it is."
    )
    command.set_defaults(run="_commands:run_features")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.h5ad", help="section with features")
    _add_feature_options(command)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Fit a model and write the section that holds it (-o), the model alone (--save), or both.\n"
        "Image features are made where the model reads them and the section has none.\n"
        f"Raw counts are normalized (10 000 a spot, log1p) and the {N_GENES} most variable genes modelled."
    )
    command.set_defaults(run="_commands:run_fit")
    command.add_argument("-o", "--output", type=Path, metavar="OUT.h5ad", help="section with the model, or OUT.zarr")
    command.add_argument("--save", type=Path, metavar="FILE.safetensors", help="the fitted model alone")
    _add_feature_options(command)
    _add_fit_options(command)


def _add_upsample(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Predict expression on a grid finer than the spots and write it as a section of its own.\n"
        "Features and a fitted model are used where the section has them, and made where not.\n"
        f"Raw counts are normalized (10 000 a spot, log1p) and the {N_GENES} most variable genes modelled."
    )
    command.epilog = "example:\n  sthisto upsample SECTION.h5ad --image SECTION.jpg -o dense.h5ad"
    command.set_defaults(run="_commands:run_upsample")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DENSE.h5ad", help="the dense section")
    _add_grid(command)
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw genes, measured next to predicted")
    command.add_argument("--show", metavar="GENE,GENE", help="genes to draw (default: the most variable of the map)")
    _add_feature_options(command)
    _add_fit_options(command)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Hide half of the spots, one by one and in blocks, fit models on the others, and score them on\n"
        "the hidden ones. With raw counts, in X or in layers['counts'], genes are chosen again on each\n"
        "training half and the noise ceiling is given."
    )
    command.epilog = "example:\n  sthisto evaluate SECTION.h5ad --image SECTION.jpg -o scores.csv"
    command.set_defaults(run="_commands:run_evaluate")
    command.add_argument("-o", "--output", type=Path, metavar="SCORES.csv", help="scores of every gene, one a line")
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the comparison of models")
    command.add_argument(
        "--models",
        default=",".join(EVALUATED),
        metavar="NAME,NAME",
        help=f"of {', '.join(MODELS)} (default %(default)s)",
    )
    command.add_argument("--split", action="append", choices=("random", "block"), help="one of them (default: both)")
    command.add_argument("--fraction", type=float, default=0.5, metavar="SHARE", help="to hide (default 0.5)")
    command.add_argument("--repeats", type=_positive, default=3, metavar="N", help="of each split (default 3)")
    command.add_argument("--genes", metavar="GENES", help="genes to score: a file with one a line, or A,B,C")
    command.add_argument("--layer", metavar="NAME", help="layer with log-normalized expression")
    command.add_argument("--seed", type=int, metavar="N", help="random seed (default 0)")
    _add_feature_options(command)


def _add_batch(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Learn from all measured sections of a sample sheet together, and write a dense map of every section.\n"
        "The sheet is a CSV file; its first line is section,image,role, and where needed table,mpp,pitch_um. A role\n"
        "is measured or stained. A table is an h5ad file or an output folder of Space Ranger; that of a measured\n"
        "section is SECTION.h5ad or SECTION next to the sheet by default, and its image may be left out where the\n"
        "table holds it. mpp and pitch_um are those of one section, in micrometers. A stained section is predicted\n"
        "on a grid over the spots of its table, or, where it has none, over the tissue of its image. Paths count\n"
        "from the sheet's folder.\n"
        "\n"
        "Written are DIR/SECTION.h5ad for each, and DIR/fitted.h5ad. Run again, it makes what is missing, failed or\n"
        "was made with other settings or files, and leaves the rest. A section that fails does not stop the others.\n"
        "Exit code: 0 all is made, 1 some failed, 2 a mistake in the sheet or the options."
    )
    command.epilog = "example:\n  sthisto batch sheet.csv -o dense --grid 2"
    command.set_defaults(run="_batch:run_batch", library_key=SECTION, image=None)
    command.add_argument("sheet", type=Path, metavar="SHEET.csv", help="the sections, one a line")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where to write")
    _add_grid(command)
    _add_description_options(command.add_argument_group("features"))
    _add_fit_options(command)


def _add_grid(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--grid",
        type=_positive,
        default=2,
        metavar="N",
        help="refine the array N times: N*N as many points (default 2)",
    )
    command.add_argument(
        "--interval",
        type=float,
        metavar="SHARE",
        help="write the bounds between which this share of new measurements falls, in layers low and high",
    )
    command.add_argument(
        "--match-spot-means",
        action="store_true",
        help="points inside a spot's footprint average to the prediction at the spot",
    )


def _add_feature_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("picture and features")
    group.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="picture that the coordinates refer to (default: the sharpest in uns['spatial']); several sections: "
        "--image NAME=FILE for each",
    )
    group.add_argument("--library-key", metavar="COLUMN", help="obs column that names the section of each spot")
    _add_description_options(group)


def _add_description_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--encoder", choices=sorted(ENCODERS), metavar="NAME", help=f"one of {', '.join(ENCODERS)}")
    group.add_argument("--weights", metavar="FILE", help="local weights of the encoder")
    group.add_argument("--patch-um", type=float, metavar="UM", help="side of the patch (default: the encoder's)")
    group.add_argument("--mpp", type=float, metavar="UM", help="micrometers per pixel (default: inferred)")
    group.add_argument("--pitch-um", type=float, metavar="UM", help="distance of neighboring spots, to derive --mpp")
    group.add_argument(
        "--device", type=_device, metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)"
    )


def _add_fit_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model")
    names = ", ".join(MODELS)
    group.add_argument("--model", choices=sorted(MODELS), metavar="NAME", help=f"{names} (default {MODEL})")
    group.add_argument("--params", action="append", metavar="NAME=VALUE", help="setting of the model, as epochs=20")
    group.add_argument("--genes", metavar="GENES", help="genes to model: a file with one a line, or A,B,C")
    group.add_argument("--layer", metavar="NAME", help="layer with log-normalized expression (default: X)")
    group.add_argument("--seed", type=int, metavar="N", help="random seed (default 0)")
    group.add_argument(
        "--test-genes",
        action="store_true",
        default=None,  # as all options that a fit is made again for
        help="test which genes can be predicted (var: sthisto_pearson, sthisto_qvalue); about 5 times the fitting time",
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is none of cpu, cuda, cuda:1, mps")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1, 2, 3 ...")
    return number


# --- completion by the shell ------------------------------------------------------------------------------------------


def run_completion(job: Job) -> tuple[dict[str, Any], str]:
    """Give the script that a shell evaluates to complete what is typed after ``sthisto``."""
    text = script(parser(), job.args.shell)
    return {"shell": job.args.shell, "script": text}, text


def script(whole: argparse.ArgumentParser, shell: str) -> str:
    """Give the script of a parser; options that take a file complete files."""
    import shtab  # noqa: PLC0415  only here

    for action in _actions(whole):
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(whole, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of a parser and of its commands."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found.extend(each for command in action.choices.values() for each in _actions(command))
    return found
