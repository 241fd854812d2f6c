"""The real sections of the data folder, as AnnData with raw counts and image features.

The files are described in the folder's README. What they do not say themselves stands here: which image belongs to a
section and how far its spots lie apart.
"""

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
from anndata import AnnData

import sthisto
from sthisto.encoders import Encoder

DATA = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Source:
    """Where a section lies under the data folder."""

    table: str
    image: str | None  # None: the image is in the table
    pitch_um: float
    min_share: float  # of the training spots that a gene must be seen in


SECTIONS = {
    "B4": Source("her2st/B4.h5ad", "her2st/B4.jpg", 200.0, 0.1),
    "C2": Source("her2st/C2.h5ad", "her2st/C2.jpg", 200.0, 0.1),
    "C3": Source("her2st/C3.h5ad", "her2st/C3.jpg", 200.0, 0.1),
    "MOB1": Source("mob/MOB1.h5ad", "mob/MOB1.jpg", 200.0, 0.1),
    "MOB2": Source("mob/MOB2.h5ad", "mob/MOB2.jpg", 200.0, 0.1),
    "MOBR11": Source("mob_rep11/MOBR11.h5ad", "mob_rep11/MOBR11.jpg", 200.0, 0.1),
    "151673": Source("dlpfc/151673.h5ad", None, 100.0, 0.0),
}
PARTNERS = {"C2": "C3", "C3": "C2", "MOB1": "MOB2", "MOB2": "MOB1"}  # serial sections of one tissue


def read(name: str, data: Path = DATA, encoder: str | Encoder = "handcrafted") -> AnnData:
    """Raw counts in ``X``, positions in ``obsm["spatial"]``, image features in ``obsm["X_histo"]``."""
    source = SECTIONS[name]
    path = data / source.table
    if not path.is_file():
        raise FileNotFoundError(f"section {name} was looked for at {path}; name the folder that holds it with --data")
    adata = ad.read_h5ad(path)
    image = None if source.image is None else data / source.image
    sthisto.pp.extract_features(adata, encoder, image=image, pitch_um=source.pitch_um)
    return adata
