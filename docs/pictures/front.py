"""Draw the figure of the front page from section 151673: ``python docs/pictures/front.py [SECTION.h5ad]``.

Without a file, full-resolution image and counts are downloaded. Maynard et al. 2021; image from
LieberInstitute/HumanPilot (Artistic-2.0).
"""

import sys
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import scanpy as sc
from PIL import Image

import sthisto

PICTURE = Path(__file__).with_name("front.jpg")
WIDTH = 1200  # pixels
GENES = {"ENSG00000197971": "MBP", "ENSG00000183036": "PCP4"}


def section() -> anndata.AnnData:
    """Read the section, log-normalized, with its thousand most variable genes marked."""
    if len(sys.argv) < 2:
        adata = sthisto.datasets.dlpfc("151673")
        counts = "counts"
    else:
        adata = anndata.read_h5ad(sys.argv[1])
        adata.layers["counts"], counts = adata.X.copy(), "counts"
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=1000, layer=counts)
    return adata


def main() -> None:
    """Fit, predict on a grid twice as fine, draw."""
    adata = section()
    adata.var_names = [GENES.get(name, name) for name in adata.var_names]
    adata.var.loc[list(GENES.values()), "highly_variable"] = True
    sthisto.pp.extract_features(adata)
    sthisto.tl.fit(adata)
    sthisto.tl.test_genes(adata)
    dense = sthisto.tl.upsample(adata, 2)
    figure = sthisto.pl.genes(adata, list(GENES.values()), dense=dense, image="panel", return_fig=True)
    figure.savefig(PICTURE.with_suffix(".png"), dpi=200, bbox_inches="tight")
    plt.close(figure)
    picture = Image.open(PICTURE.with_suffix(".png")).convert("RGB")
    picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS).save(
        PICTURE, quality=78, optimize=True
    )
    PICTURE.with_suffix(".png").unlink()
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB, {dense.n_obs} points")


main()
