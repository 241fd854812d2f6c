"""Sections of an invented tissue, whose picture and expression come from the same maps, known everywhere."""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.special import expit, softmax

__all__ = ["synthetic", "synthetic_truth"]

Floats = NDArray[np.float64]

KINDS = ("region", "fine", "density", "hidden", "noise")
REGIONS = ("layer_1", "layer_2", "layer_3", "layer_4", "gland")
LAYER_EDGES = (-0.45, 0.0, 0.45)  # along the gradient, which runs from about -1 to 1 over the tissue
LENGTHS = np.array([4.0, 1.3, 3.0, 2.5, 2.5])  # correlation lengths of the maps in pitches: see _Tissue.maps
HAEMATOXYLIN = (0.563, 0.720, 0.406)  # optical density in red, green, blue (Macenko et al. 2009)
EOSIN = (0.216, 0.801, 0.558)
NUCLEUS_UM = 3.6  # mean half axis
GLAND, LUMEN = 0.8, 1.9  # of the map of glands: above the first is gland, above the second it is hollow
N_WAVES = 32
EOSIN_OF_REGION = np.array([0.34, 0.55, 0.42, 0.68, 0.42], np.float32)
NUCLEI_PER_UM2 = np.array([0.5e-3, 2.4e-3, 1.0e-3, 3.2e-3, 4.0e-3], np.float32)
ROWS_OF_KIND = {  # which responses of the maps, in _share, a gene of the kind may follow
    "region": range(5),
    "fine": range(5, 7),
    "density": range(7, 8),
    "hidden": range(8, 10),
    "noise": range(0),
}


def synthetic(
    n_spots: int = 200,
    *,
    n_genes: int = 60,
    array: Literal["hexagonal", "square"] = "hexagonal",
    n_sections: int = 1,
    pitch_um: float = 100.0,
    mpp: float = 2.0,
    rotation: float = 0.0,
    depth: float = 3000.0,
    random_state: int = 0,
) -> AnnData:
    """Make sections of an invented tissue with a stained picture and counts, whose true expression is known everywhere.

    A method can only be evaluated between the spots where the truth between the spots is known. Here smooth random maps
    over the plane (a gradient cut into four layers, glands, cell density, and two that leave no trace in the picture)
    determine both an H&E-like picture with its nuclei and the rate of every gene; counts are drawn from the rates.

    Parameters
    ----------
    n_spots
        Spots of every section, all on tissue.
    n_genes
        Genes, at least 10. ``var["kind"]`` is what each follows: ``"region"`` marks one layer or the glands with
        steep borders, ``"fine"`` follows glands and their rims between the spots, ``"density"`` the density of cells,
        ``"hidden"`` maps that the picture does not show, ``"noise"`` nothing at all. A fifth of each.
    array
        Hexagonal as Visium, or square as the older arrays.
    n_sections
        Sections in the one object, with coordinates that overlap. Layout, stain and depth differ from section to
        section; what a kind of tissue expresses does not.
    pitch_um
        Distance between neighboring spots in µm; the structures of the tissue scale with it.
    mpp
        µm per pixel of the picture.
    rotation
        Degrees by which the array is turned, from x towards y.
    depth
        Mean counts of a spot in the first section; the others vary about it.
    random_state
        Same seed, same object. The first section does not depend on ``n_sections``.

    Returns
    -------
    ``X``
        (n, n_genes) CSR float32, log1p of counts per 10 000; ``layers["counts"]`` the counts
    ``obs``
        ``region``, ``library`` (categorical), ``array_row``, ``array_col`` (numbered as Visium does)
    ``var``
        ``kind`` (categorical)
    ``obsm["spatial"]``
        (n, 2) float64, pixels of the picture, x then y
    ``uns["spatial"][library]``
        the picture (h, w, 3) uint8 as ``hires``, at full resolution, and its scale factors
    ``uns["synthetic"]``
        the tissue, for :func:`synthetic_truth`; ``["nuclei"][library]`` (m, 2) where the nuclei are, which may overlap

    Raises
    ------
    ValueError
        A number out of range, or an unknown array.

    Examples
    --------
    >>> adata = synthetic(50, n_genes=20)
    >>> adata.shape, sorted(adata.obs["library"].unique())
    ((50, 20), ['synthetic_0'])
    >>> adata.uns["spatial"]["synthetic_0"]["images"]["hires"].dtype
    dtype('uint8')
    """
    _check(n_spots, n_genes, array, n_sections, {"pitch_um": pitch_um, "mpp": mpp, "depth": depth})
    first, *streams = (np.random.default_rng(s) for s in np.random.SeedSequence(random_state).spawn(n_sections + 1))
    genes = _draw_genes(n_genes, first)
    sections = {}
    for i, rng in enumerate(streams):
        tissue, spots, xy, size = _draw_tissue(
            n_spots, array=array, pitch_um=pitch_um, mpp=mpp, rotation=rotation, rng=rng
        )
        counts = _draw_counts(_share(tissue, genes, xy), depth * rng.lognormal(0, 0.3) if i else depth, rng)
        section = AnnData(counts, obs=spots, var=pd.DataFrame(index=genes["name"]), obsm={"spatial": xy})
        scales = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 0.55 * pitch_um / mpp, "microns_per_pixel": mpp}
        pixels, nuclei = _draw_picture(tissue, *size, rng)
        picture = {"images": {"hires": pixels}, "scalefactors": scales}
        name = f"synthetic_{i}"
        section.uns = {
            "spatial": {name: picture},
            "synthetic": {"tissue": {name: asdict(tissue)}, "nuclei": {name: nuclei}},
        }
        sections[name] = section
    adata = anndata.concat(sections, label="library", index_unique="-", uns_merge="unique")
    adata.var["kind"] = pd.Categorical(genes["kind"], KINDS)
    adata.uns["synthetic"]["genes"] = genes
    adata.layers["counts"] = adata.X
    per_spot = 1e4 / np.maximum(adata.X.sum(axis=1), 1)  # (n, 1); a spot may have caught nothing
    adata.X = adata.X.multiply(per_spot).log1p().tocsr().astype(np.float32)
    return adata


def synthetic_truth(
    adata: AnnData, xy: NDArray[np.float64] | None = None, library: str | None = None
) -> NDArray[np.float32]:
    """Give the true expression of a synthetic section at any points, without noise, on the scale of its ``X``.

    It is ``log1p(10 000 * rate / sum of the rates of all genes)``, which counts of great depth would tend to.

    Parameters
    ----------
    adata
        What :func:`synthetic` made, or some of its spots and genes.
    xy
        (m, 2) pixels of the picture, x then y. ``None`` takes the spots. The maps go on outside the tissue's outline.
    library
        The section that ``xy`` belongs to; with ``xy=None`` the section whose spots to take (``None``: all spots).

    Returns
    -------
    (m, n_vars) float32, genes as in ``adata.var_names``

    Raises
    ------
    KeyError
        Not a synthetic section, or no such library or gene in it.
    ValueError
        ``xy`` is not (m, 2), or there are several sections and ``library`` does not name one.

    Examples
    --------
    >>> adata = synthetic(50, n_genes=20)
    >>> synthetic_truth(adata, xy=adata.obsm["spatial"][:3] + 10.0).shape
    (3, 20)
    """
    if "synthetic" not in adata.uns:
        raise KeyError(f"no 'synthetic' in adata.uns (found: {sorted(adata.uns)}): pass what synthetic() returned.")
    tissues = {name: _Tissue(**fields) for name, fields in adata.uns["synthetic"]["tissue"].items()}
    genes = adata.uns["synthetic"]["genes"]
    if library is not None and library not in tissues:
        raise KeyError(f"no section {library!r} (found: {sorted(tissues)}).")
    columns = pd.Index(genes["name"]).get_indexer(adata.var_names)
    if (columns < 0).any():
        raise KeyError(f"genes without a truth: {list(adata.var_names[columns < 0])}.")
    owner = adata.obs["library"].astype(str).to_numpy()
    if xy is None:
        rows = np.full(len(owner), fill_value=True) if library is None else owner == library
        xy, owner = adata.obsm["spatial"][rows], owner[rows]
    else:
        if library is None and len(tissues) > 1:
            raise ValueError(f"several sections ({sorted(tissues)}): pass library=, the one that xy belongs to.")
        xy = np.asarray(xy, float)
        if xy.ndim != 2 or xy.shape[1] != 2:
            raise ValueError(f"xy has the shape {xy.shape}: pass (m, 2), x then y.")
        owner = np.full(len(xy), library or next(iter(tissues)))
    truth = np.empty((len(xy), len(columns)), np.float32)
    for name in np.unique(owner):
        rows = owner == name
        truth[rows] = np.log1p(1e4 * _share(tissues[name], genes, xy[rows]))[:, columns]
    return truth


def _check(n_spots: int, n_genes: int, array: str, n_sections: int, sizes: dict[str, float]) -> None:
    for name, number, least in (("n_spots", n_spots, 7), ("n_genes", n_genes, 10), ("n_sections", n_sections, 1)):
        if number < least:
            raise ValueError(f"{name}={number} is too few: pass {least} or more.")
    for name, size in sizes.items():
        if not 0 < size < np.inf:
            raise ValueError(f"{name}={size} is not a size: pass a positive number.")
    if array not in ("hexagonal", "square"):
        raise ValueError(f"unknown array {array!r}: pass array='hexagonal' or array='square'.")


@dataclass(frozen=True)
class _Tissue:
    """Smooth random maps over a plane, and an outline: numbers and arrays only, to be kept in ``uns``."""

    mpp: float
    centre: Floats  # (2,) px
    direction: Floats  # (2,) per µm: the gradient grows by 1 over the mean radius of the tissue
    waves: Floats  # (5, k, 3) of every map: angular frequency in x and in y per µm, phase
    lobes: Floats  # (2, 3) real and imaginary part of the outline's harmonics 2, 3, 4
    limit: float  # µm: tissue is where _reach < limit

    def maps(self, xy: Floats) -> Floats:
        """(5, m) gradient, glands, density and two hidden maps at points in pixels; the last four of variance 1."""
        um = (xy - self.centre) * self.mpp
        phases = self.waves[..., :2] @ um.T + self.waves[..., 2:]  # (5, k, m)
        maps: Floats = np.sqrt(2 / phases.shape[1]) * np.cos(phases).sum(1)
        maps[0] = um @ self.direction + 0.25 * maps[0]
        return maps

    def pixels_um(self, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(width,) and (height, 1): x and y from the centre at the middle of every pixel."""
        x = (np.arange(width) + 0.5 - self.centre[0]) * self.mpp
        y = (np.arange(height) + 0.5 - self.centre[1]) * self.mpp
        return x.astype(np.float32), y.astype(np.float32)[:, None]

    def picture_maps(self, height: int, width: int) -> NDArray[np.float32]:
        """(3, height, width) the first three maps, which the picture shows, at the centres of its pixels."""
        x, y = self.pixels_um(height, width)
        maps = np.empty((3, height, width), np.float32)
        for picture, (wx, wy, phase) in zip(maps, np.moveaxis(self.waves[:3], 2, 1), strict=True):
            # cos(a + b) = cos a cos b - sin a sin b: plane waves on a grid are one product of matrices
            a, b = y * wy + phase, np.outer(wx, x)
            left, right = np.hstack([np.cos(a), -np.sin(a)]), np.vstack([np.cos(b), np.sin(b)])
            np.matmul(left.astype(np.float32), np.sqrt(2 / len(wx)) * right.astype(np.float32), out=picture)
        maps[0] = 0.25 * maps[0] + (y * self.direction[1] + x * self.direction[0])
        return maps


def _reach(x: NDArray[np.floating], y: NDArray[np.floating], lobes: Floats) -> NDArray[np.floating]:
    """Distance from (0, 0), in a measure in which the tissue is a disc."""
    z = x + np.complex64(1j) * y
    distance = np.abs(z) + 1e-9
    turn = z / distance
    c2, c3, c4 = (lobes[0] + 1j * lobes[1]).tolist()  # Python's numbers leave float32 alone
    bulge: NDArray[np.floating] = 1 + (turn**2 * (c2 + turn * (c3 + turn * c4))).real
    return distance / bulge


def _box(lobes: Floats) -> Floats:
    """(2, 2) lowest and highest x and y of an outline of reach 1."""
    around = np.linspace(0, 2 * np.pi, 720)
    x, y = np.cos(around), np.sin(around)
    border = np.stack([x, y]) / _reach(x, y, lobes)
    return np.stack([border.min(1), border.max(1)])


def _regions(gradient: NDArray[Any], gland: NDArray[Any]) -> list[NDArray[Any]]:
    """How much of each of ``REGIONS`` a place is: 0 to 1 with steep borders, 1 in all."""
    inside = expit((gland - GLAND) / 0.12)
    above = [1.0, *(expit((gradient - edge) / 0.05) for edge in LAYER_EDGES), 0.0]
    return [*((low - high) * (1 - inside) for low, high in pairwise(above)), inside]


def _rim(gland: NDArray[Any]) -> NDArray[Any]:
    return np.exp(-(((gland - GLAND) / 0.35) ** 2))


def _draw_tissue(
    n_spots: int, *, array: str, pitch_um: float, mpp: float, rotation: float, rng: Generator
) -> tuple[_Tissue, pd.DataFrame, Floats, tuple[int, int]]:
    """Draw a tissue that holds ``n_spots`` of an array; return also their table, pixels and the size of the picture."""
    lengths = LENGTHS[:, None, None] * pitch_um
    waves = rng.normal(size=(len(LENGTHS), N_WAVES, 2)) / lengths
    angles = rng.uniform(0, 2 * np.pi, 4)
    tissue = _Tissue(
        mpp=1.0,  # in µm about (0, 0) until the size of the picture is known
        centre=np.zeros(2),
        direction=np.array([np.cos(angles[3]), np.sin(angles[3])]),
        waves=np.concatenate([waves, rng.uniform(0, 2 * np.pi, (len(LENGTHS), N_WAVES, 1))], axis=2),
        lobes=rng.uniform(0.4, 1, 3) * [0.18, 0.08, 0.05] * np.stack([np.cos(angles[:3]), np.sin(angles[:3])]),
        limit=np.inf,
    )
    number, um = _array(n_spots, array, rotation, rng)
    um *= pitch_um
    reach = np.where(tissue.maps(um)[1] < LUMEN, _reach(um[:, 0], um[:, 1], tissue.lobes), np.inf)
    limit = float(np.sort(reach)[n_spots - 1 : n_spots + 1].mean())
    number, um = number[reach < limit], um[reach < limit]

    low, high = _box(tissue.lobes) * limit + [[-pitch_um], [pitch_um]]
    tissue = replace(tissue, mpp=float(mpp), centre=-low / mpp, direction=tissue.direction / limit, limit=limit)
    xy = um / mpp + tissue.centre
    gradient, gland, *_ = tissue.maps(xy)
    table = pd.DataFrame(number, index=[f"{row}x{col}" for row, col in number], columns=["array_row", "array_col"])
    region = np.where(gland > GLAND, len(LAYER_EDGES) + 1, np.digitize(gradient, LAYER_EDGES))
    table["region"] = pd.Categorical(np.array(REGIONS)[region], REGIONS)
    width, height = (int(n) for n in np.ceil((high - low) / mpp))
    return tissue, table, xy, (height, width)


def _array(n_spots: int, array: str, rotation: float, rng: Generator) -> tuple[NDArray[np.int64], Floats]:
    """Numbers (row, col) and positions in pitches of an array about (0, 0), wide enough for ``n_spots`` of it."""
    half = 2 * int(0.7 * np.sqrt(n_spots) + 3)  # even, and a margin for the tissue's bulges
    row, col = np.indices((2 * half, 4 * half)).reshape(2, -1)
    step = np.array([1.0, 1.0])
    if array == "hexagonal":
        row, col = row[(row + col) % 2 == 0], col[(row + col) % 2 == 0]
        step = np.array([0.5, np.sqrt(0.75)])
    c, s = np.cos(np.deg2rad(rotation)), np.sin(np.deg2rad(rotation))
    xy = (np.stack([col - 2 * half, row - half], axis=1) + rng.uniform(-1, 1, 2)) * step
    return np.stack([row, col], axis=1), xy @ np.array([[c, s], [-s, c]])


def _draw_genes(n_genes: int, rng: Generator) -> dict[str, NDArray[Any]]:
    """Draw what each gene follows: its kind, log rate, and weights (10, g) of the responses in :func:`_share`."""
    kind = np.resize(KINDS, n_genes)
    weights = np.zeros((10, n_genes))
    for i in range(n_genes):
        turn = i // len(KINDS)
        rows = ROWS_OF_KIND[kind[i]]
        if len(rows):
            sign = 1 if kind[i] == "region" else (-1) ** turn
            weights[rows[turn % len(rows)], i] = sign * rng.uniform(1.5, 3.0)
    name = [f"{k}_{i:02d}" for i, k in enumerate(kind)]
    return {"name": np.array(name), "kind": kind, "base": rng.normal(0, 0.7, n_genes), "weights": weights}


def _share(tissue: _Tissue, genes: dict[str, NDArray[Any]], xy: Floats) -> Floats:
    """(m, g) share of every gene in the counts. Each kind has a fixed part, so that none depends on another."""
    gradient, gland, density, hidden, other = tissue.maps(xy)
    responses = [
        *_regions(gradient, gland),
        *(np.tanh(gland), _rim(gland)),
        np.tanh(density),
        *(np.tanh(hidden), np.sin(1.5 * other)),
    ]
    rate: Floats = genes["base"] + np.stack(responses, axis=1) @ genes["weights"]
    for kind in KINDS:
        of_kind = genes["kind"] == kind
        rate[:, of_kind] = of_kind.mean() * softmax(rate[:, of_kind], axis=1)
    return rate


def _draw_counts(share: Floats, depth: float, rng: Generator) -> csr_matrix:
    """Negative binomial counts of dispersion 0.1 about each gene's share in the spot's own depth."""
    own = depth * rng.lognormal(-(0.35**2) / 2, 0.35, (len(share), 1))
    return csr_matrix(rng.poisson(own * share * rng.gamma(10, 0.1, share.shape)).astype(np.float32))


def _draw_picture(tissue: _Tissue, height: int, width: int, rng: Generator) -> tuple[NDArray[np.uint8], Floats]:
    """Stain by Beer and Lambert: dark nuclei, whose centers are returned, pink matrix, and white where no tissue is."""
    gradient, gland, density = tissue.picture_maps(height, width)
    x, y = tissue.pixels_um(height, width)
    inside = np.clip((tissue.limit - _reach(x, y, tissue.lobes)) / (2 * tissue.mpp) + 0.5, 0, 1)
    inside *= expit((LUMEN - gland) / 0.05)
    regions, crowd = np.stack(_regions(gradient, gland)), np.tanh(density)
    per_um2 = np.tensordot(NUCLEI_PER_UM2, regions, 1) * np.exp(0.9 * crowd)
    nuclei, centers = _draw_nuclei((per_um2 + np.float32(4e-3) * _rim(gland)) * (inside > 0.5), tissue.mpp, rng)
    grain = gaussian_filter(rng.standard_normal((height, width), np.float32), 6 / tissue.mpp, truncate=2)
    eosin = np.tensordot(EOSIN_OF_REGION, regions, 1) * (1 - 0.2 * crowd + np.float32(0.12) * grain / grain.std())
    noise = 0.06 * rng.standard_normal((height, width), np.float32)
    sharp = gaussian_filter(1.5 * nuclei + noise, 0.7, truncate=3)  # pixels of a scan are no sharper than its optics
    strength = rng.lognormal(0, 0.12, 2).astype(np.float32)
    haematoxylin = strength[0] * (inside * (0.06 + 0.15 * regions[-1]) + sharp)
    eosin *= strength[1] * inside
    picture = np.empty((height, width, 3), np.uint8)
    for channel, (h, e) in enumerate(zip(HAEMATOXYLIN, EOSIN, strict=True)):
        picture[..., channel] = np.clip(244 * np.exp(-(h * haematoxylin + e * eosin)), 0, 255)
    return picture, centers


def _draw_nuclei(per_um2: NDArray[np.float32], mpp: float, rng: Generator) -> tuple[NDArray[np.float32], Floats]:
    """(h, w) how far each pixel is covered by nuclei, ellipses strewn at the density; (k, 2) their centers."""
    height, width = per_um2.shape
    row, col = np.nonzero(rng.random((height, width), np.float32) < per_um2 * mpp**2)
    long = (NUCLEUS_UM / mpp * rng.lognormal(0, 0.15, len(row))).astype(np.float32)
    short = long * rng.uniform(0.5, 0.95, len(row)).astype(np.float32)
    turn = np.exp(1j * rng.uniform(0, np.pi, len(row))).astype(np.complex64)
    half = int(np.ceil(1.5 * NUCLEUS_UM / mpp)) + 1
    dy, dx = np.indices((2 * half + 1, 2 * half + 1)).reshape(2, -1) - half
    covered = np.zeros((height + 2 * half, width + 2 * half), np.float32)  # with a margin, cut off at the end
    for part in np.array_split(np.arange(len(row)), 1 + len(row) * len(dx) // 2_000_000):  # bounds the memory
        z = (dx + 1j * dy).astype(np.complex64) * turn[part, None]
        distance = np.hypot(z.real / long[part, None], z.imag / short[part, None])
        ink = np.clip((1 - distance) * short[part, None] + 0.5, 0, 1)  # an edge one pixel wide
        where = (row[part, None] + half + dy) * covered.shape[1] + col[part, None] + half + dx
        np.maximum.at(covered.ravel(), where.ravel(), ink.ravel())
    return covered[half:-half, half:-half], np.column_stack([col, row]).astype(np.float64) + 0.5
