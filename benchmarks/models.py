"""What every model reaches on real sections, and what it costs: half of the spots hidden, at random and in blocks.

    python benchmarks/models.py [--data DIR] [--models attention ridge] [--sections B4 C2] [--seeds 2] [--save FILE.csv]
    python benchmarks/models.py --sections C2 --models histosge:variant=scripts stnet:epochs=4,weights=scratch --seeds 1

A model may bring settings, as in the second line, and the tables name it so. Scores are those of
``sthisto.tl.evaluate``, means over genes and seeds: Pearson r / mean squared error of log1p CP10K on the hidden spots,
with genes chosen on the training spots, and r once more as a share of the noise ceiling. Below them the costs of a
fit, seconds / MB that the process grew by, and the paired differences of the first model to the others, with t
intervals over sections and seeds.
``sections.py`` adds serial sections.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from heldout import Table, parser
from sections_data import SECTIONS, read

import sthisto
from sthisto.evaluation import compare, gene_means
from sthisto.models import MODELS


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--splits", nargs="+", default=["random", "block"], choices=["random", "block"])
    options.add_argument("--save", metavar="FILE.csv", help="write the scores of every gene")
    named = next(action for action in options._actions if action.dest == "models")
    named.choices, named.type = None, model_and_settings
    options.set_defaults(models=[(name, name, {}) for name in ("attention", "gp", "ridge", "idw")])
    arguments = options.parse_args()
    reports = []
    for name in arguments.sections:
        adata = read(name, arguments.data)
        adata.layers["counts"] = adata.X
        for label, model, settings in arguments.models:
            report = sthisto.tl.evaluate(
                adata,
                {model: settings},
                split=arguments.splits,
                n_repeats=arguments.seeds,
                counts_layer="counts",
                image=image_of(name, arguments.data),
            )
            fitted = report["model"] == model
            kept = report if label == arguments.models[-1][0] else report[fitted]  # reference_scores once
            reports.append(kept.assign(section=name, model=kept["model"].where(kept["model"] != model, label)))
    report = pd.concat(reports, ignore_index=True)
    if arguments.save:
        report.to_csv(arguments.save, index=False)
    for split, title in (("random", "at random"), ("block", "in blocks of 4 pitches")):
        if split in arguments.splits:
            show(report[report["split"] == split], f"Half hidden {title}: Pearson r / MSE", "pearson", "mse")
            show_shares(report[report["split"] == split], f"Half hidden {title}: r as a share of the noise ceiling, %")
    show(report, "Fit: seconds / MB", "seconds", "peak_memory_mb", style="{:.1f}")
    if len(arguments.models) > 1:
        first = arguments.models[0][0]
        pairs = compare(report).query("model == @first")
        print(f"\nMean r of {first} less that of others\n\n{pairs.round(4).to_string(index=False)}")


def model_and_settings(text: str) -> tuple[str, str, dict[str, object]]:
    """Take ``histosge:variant=scripts,epochs=50`` apart: label, model and params."""
    model, _, settings = text.partition(":")
    if model not in MODELS:
        raise argparse.ArgumentTypeError(f"no model {model!r} (there are: {', '.join(MODELS)})")
    pairs = (each.partition("=") for each in settings.split(",") if each)
    return text, model, {name: value_of(value) for name, _, value in pairs}


def value_of(text: str) -> object:
    """Read a number, true, false or null as JSON has them, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def image_of(name: str, data: Path) -> Path | None:
    """Where the section's picture is a file: models that read pixels take it."""
    file = SECTIONS[name].image
    return None if file is None else data / file


def show(report: pd.DataFrame, title: str, *metrics: str, style: str = "{:.3f}") -> None:
    """Print the means of metrics by section and model."""
    table = Table(title)
    figures = pd.concat([gene_means(report, metric) for metric in metrics])
    means = figures.groupby(["section", "model", "metric"], sort=False)["value"].mean().unstack("metric")
    for (section, model), row in means.iterrows():
        table.add(section, model, *(row[metric] for metric in metrics if pd.notna(row[metric])))
    table.print(style.format)


def show_shares(report: pd.DataFrame, title: str) -> None:
    """Print how much of the r that the true rate would reach the models do."""
    table = Table(title)
    figures = gene_means(report, "pearson")
    means = figures.groupby(["section", "model"], sort=False)["value"].mean()
    for (section, model), r in means.items():
        if model.partition(":")[0] in MODELS:
            table.add(section, model, 100 * r / means[section, "ceiling"])
    table.print("{:.0f}".format)


if __name__ == "__main__":
    main()
