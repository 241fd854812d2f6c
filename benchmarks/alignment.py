"""How often sections as they are, and sections whose spots were moved on purpose, are recognized, and put right.

    python benchmarks/alignment.py [--data DIR] [--sections C2 MOB1] [--trials 5] [--halves 4]

as it is      the section, and random halves of its spots: each false alarm is a ``misaligned``
symmetry ...  the spots moved by a flip or quarter turn, a rotation of 5 to 15 degrees, a scale of 4 to 10 %, a shift of
              1 to 3 pitches, and all of them: verdicts, and the error of the recovered positions in pitches
permuted      the expression permuted over the spots

The features of an image are computed once. Genes: 1 000 by variance among those seen in a tenth of the spots.
"""

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sections_data import DATA, SECTIONS

from sthisto import _data, encoders, metrics
from sthisto.alignment import SYMMETRIES, Alignment, FeatureRaster, Similarity, check
from sthisto.pp._alignment import _raster

KINDS = ("symmetry", "rotation", "shift", "scale", "all")


def load(name: str, data: Path) -> tuple[FeatureRaster, NDArray[np.float64], NDArray[np.float32], float]:
    """Features of the image, positions, expression and pitch."""
    source = SECTIONS[name]
    adata = ad.read_h5ad(data / source.table)
    adata.X = metrics.lognorm(adata.X)
    seen = np.asarray((adata.X > 0).mean(axis=0)).ravel() >= 0.1
    values = adata.X[:, seen].toarray()
    values = values[:, np.argsort(-values.var(axis=0))[:1000]]
    [section] = _data.read_sections(adata, None).values()
    opened = _data.open_image_anywhere(
        adata, section, source.image and data / source.image, mpp=None, pitch_um=source.pitch_um
    )
    return _raster(section, opened, encoders.load("handcrafted")), section.xy, values, section.pitch


def moved(kind: str, xy: NDArray[np.float64], pitch: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Positions (n, 2) after a random transformation of a kind."""
    some = lambda *kinds: kind in (*kinds, "all")  # noqa: E731
    symmetry = (
        str(random.choice([name for name in SYMMETRIES if name != "identity"])) if some("symmetry") else "identity"
    )
    rotation = random.uniform(5, 15) * random.choice([-1, 1]) if some("rotation") else 0.0
    scale = 1 + random.uniform(0.04, 0.1) * random.choice([-1, 1]) if some("scale") else 1.0
    angle, length = random.uniform(0, 2 * np.pi), random.uniform(1, 3) * pitch if some("shift") else 0.0
    shift = (length * np.cos(angle), length * np.sin(angle))
    return Similarity.of(symmetry, rotation=rotation, scale=scale, shift=shift, center=xy.mean(axis=0))(xy)


def error(result: Alignment, wrong: NDArray[np.float64], xy: NDArray[np.float64], pitch: float) -> float:
    """Root mean square distance of the recovered positions from the true ones, pitches."""
    return float(np.sqrt(((result.transformation(wrong) - xy) ** 2).sum(axis=1).mean()) / pitch)


def trials(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a trial of a section."""
    raster, xy, expression, pitch = load(name, options.data)
    rows: list[dict[str, object]] = []

    def note(kind: str, places: NDArray[np.float64], values: NDArray[np.float32], truth: NDArray[np.float64]) -> None:
        start = time.perf_counter()
        result = check(raster, places, values, pitch=pitch, random_state=len(rows))
        row = {"section": name, "kind": kind, "verdict": result.verdict, "error": error(result, places, truth, pitch)}
        rows.append({**row, "seconds": time.perf_counter() - start})

    note("as it is", xy, expression, xy)
    for number in range(options.halves):
        half = np.random.default_rng(number).permutation(len(xy))[: len(xy) // 2]
        note("halves", xy[half], expression[half], xy[half])
    for kind in KINDS:
        for number in range(options.trials):
            note(kind, moved(kind, xy, pitch, np.random.default_rng(number)), expression, xy)
    for number in range(options.trials):
        note("permuted", xy, expression[np.random.default_rng(number).permutation(len(xy))], xy)
    return rows


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--data", type=Path, default=DATA, help="folder of the real sections")
    about.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    about.add_argument("--trials", type=int, default=5, help="of each kind")
    about.add_argument("--halves", type=int, default=4)
    options = about.parse_args()
    print("| section | kind | trials | aligned | misaligned | undecidable | median error, pitches | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.sections:
        table = pd.DataFrame(trials(name, options))
        for kind, part in table.groupby("kind", sort=False):
            counts = [int((part["verdict"] == each).sum()) for each in ("aligned", "misaligned", "undecidable")]
            print(
                f"| {name} | {kind} | {len(part)} | {' | '.join(map(str, counts))} | {part['error'].median():.2f} | "
                f"{part['seconds'].mean():.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
