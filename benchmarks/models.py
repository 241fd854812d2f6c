"""What every model reaches on real sections, and what it costs: half of the spots hidden, at random and in blocks.

    python benchmarks/models.py [--data DIR] [--models attention ridge] [--sections B4 C2] [--seeds 2] [--save FILE.csv]

Scores are those of ``sthisto.tl.evaluate``, means over genes and seeds: Pearson r / mean squared error of log1p CP10K
on the hidden spots, with genes chosen on the training spots. Below them the costs of a fit, seconds / MB that the
process grew by, and the paired differences of the first model to the others, with t intervals over sections and seeds.
``heldout.py`` measures the same from plain arrays, without the AnnData layer, and adds a serial section.
"""

import pandas as pd
from heldout import Table, parser
from sections_data import read

import sthisto
from sthisto.evaluation import compare, gene_means


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--save", metavar="FILE.csv", help="write the scores of every gene")
    options.set_defaults(models=["attention", "gp", "ridge", "idw"])
    arguments = options.parse_args()
    reports = []
    for name in arguments.sections:
        adata = read(name, arguments.data)
        adata.layers["counts"] = adata.X
        report = sthisto.tl.evaluate(adata, arguments.models, n_repeats=arguments.seeds, counts_layer="counts")
        reports.append(report.assign(section=name))
    report = pd.concat(reports, ignore_index=True)
    if arguments.save:
        report.to_csv(arguments.save, index=False)
    for split, title in (("random", "at random"), ("block", "in blocks of 4 pitches")):
        part = report[report["split"] == split]
        show(part, f"Half hidden {title}: Pearson r / MSE", "pearson", "mse")
    show(report, "Fit: seconds / MB", "seconds", "peak_memory_mb", style="{:.1f}")
    if len(arguments.models) > 1:
        pairs = compare(report).query("model == @arguments.models[0]")
        print(f"\nMean r of {arguments.models[0]} less that of others\n\n{pairs.round(4).to_string(index=False)}")


def show(report: pd.DataFrame, title: str, *metrics: str, style: str = "{:.3f}") -> None:
    """Print the means of metrics by section and model."""
    table = Table(title)
    figures = pd.concat([gene_means(report, metric) for metric in metrics])
    means = figures.groupby(["section", "model", "metric"], sort=False)["value"].mean().unstack("metric")
    for (section, model), row in means.iterrows():
        table.add(section, model, *(row[metric] for metric in metrics if pd.notna(row[metric])))
    table.print(style.format)


if __name__ == "__main__":
    main()
