"""Whether spots are registered to their image, and their correction."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sthisto import _data
from sthisto._data import SectionData, SectionImage
from sthisto.alignment import Alignment, FeatureRaster, Warp, check, fit_warp
from sthisto.encoders import Encoder, load
from sthisto.encoders._encode import encode
from sthisto.images import is_blank, tissue_points

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

STEP = 1 / 3  # of the raster, pitches
logger = logging.getLogger("sthisto")


@_data.accepts_spatialdata(image="image", library_key="library_key")
def check_alignment(
    adata: "AnnData | SpatialData",
    *,
    image: Any = None,
    library_key: str | None = None,
    encoder: str | Encoder = "handcrafted",
    genes: list[str] | None = None,
    layer: str | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    random_state: int = 0,
) -> pd.DataFrame:
    """Check from the data whether the spots are registered to the image.

    A flipped, rotated or shifted image leaves no error behind: features are extracted from the wrong tissue, and the
    map is smooth and wrong. But image features predict the expression of spots that are held out in blocks only where
    the image belongs. This compares that accuracy for the spots where they are with all flips and turns, and with
    rotations, scales and shifts; see :func:`sthisto.alignment.check` for the search and its two tests.

    Parameters
    ----------
    adata
        Section with log-normalized expression and ``obsm["spatial"]``, (n, 2) full-resolution pixels, x then y. Spots
        may be outside the image, wholly or partly. At most 1 200 spots of a section are used.
    image
        Image that the coordinates refer to, as in :func:`extract_features`. A blank one is undecidable.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    encoder
        Whose features: a name in :data:`sthisto.encoders.ENCODERS` or an encoder. The whole image is encoded on a grid
        of a third of the spots' pitch, 9 000 patches at most.
    genes, layer
        Genes (``None``: ``var["highly_variable"]``, else all) and layer (``None``: ``X``) to take expression from.
    mpp, pitch_um
        Micrometers per full-resolution pixel, or between neighboring spots, where the data do not say.
    random_state
        Of the spots that are used, the folds and the surrogates.

    Returns
    -------
    Table with one row a section; nothing is written.

    ``section``, ``verdict``, ``evidence``
        ``"aligned"``, ``"misaligned"`` or ``"undecidable"``, and the figures for it in a sentence.
    ``statistic``, ``best_statistic``
        Share of the variance of the first 8 expression factors predicted in held-out blocks, for the spots where they
        are and under the best transformation.
    ``p_value``, ``gain_p_value``
        Whether the image predicts expression where the spots are, and whether it predicts more elsewhere, corrected
        for the search.
    ``displacement``, ``displacement_um``, ``symmetry``, ``rotation``, ``scale``, ``shift_x``, ``shift_y``, ``matrix``
        The best transformation: how far it moves the spots (root mean square, pitches and um), its parts (degrees; the
        shift of the spots' center in pitches), and (2, 3) on pixels.
    ``resolution``
        Largest shift from the best, in pitches, that the data do not distinguish from it; NaN where undecidable.
    ``inside``, ``n_spots``
        Share of the spots inside the image, and spots used.
    ``symmetries``, ``shifts``, ``profile``, ``rotations``, ``rotation_profile``, ``scales``, ``scale_profile``
        The statistic under each symmetry, over shifts along y and x (k, k), rotations and scales: for
        ``sthisto.pl.alignment``.

    Raises
    ------
    KeyError
        No coordinates, image, layer, genes, or column ``library_key``.
    ValueError
        Raw counts, an unknown scale, or a section within one block of 4 pitches.
    OSError
        The image file cannot be found or read.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(220, random_state=1)
    >>> sthisto.pp.check_alignment(adata)["verdict"].tolist()
    ['aligned']
    >>> adata.obsm["spatial"] = adata.obsm["spatial"].max(axis=0) - adata.obsm["spatial"]
    >>> report = sthisto.pp.check_alignment(adata)
    >>> report[["verdict", "symmetry"]].values.tolist()
    [['misaligned', 'half turn']]
    """
    options: dict[str, Any] = {"encoder": encoder, "genes": genes, "layer": layer, "mpp": mpp, "pitch_um": pitch_um}
    checked = _check_sections(adata, image, library_key, random_state=random_state, **options)
    return pd.DataFrame([_row(each) for each in checked])


def align(
    adata: "AnnData",
    *,
    image: Any = None,
    library_key: str | None = None,
    encoder: str | Encoder = "handcrafted",
    genes: list[str] | None = None,
    layer: str | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    refine: bool = False,
    force: bool = False,
    random_state: int = 0,
) -> None:
    """Register the spots to the image by the transformation that :func:`check_alignment` finds.

    Sections that are aligned stay as they are. Features extracted and models fitted before are refused afterwards, as
    they belong to the former coordinates.

    Parameters
    ----------
    adata, image, library_key, encoder, genes, layer, mpp, pitch_um, random_state
        As in :func:`check_alignment`.
    refine
        Also fit a smooth deformation, on control points 6 pitches apart, for sections that were stretched or torn. It
        is applied only where blocks that took no part in it are predicted better.
    force
        Apply the best transformation also where the check is undecidable, and to aligned sections.

    Returns
    -------
    Nothing. Where a section moves, writes

    ``obsm["spatial"]`` : (n, 2) float64, the corrected positions
    ``obsm["spatial_before_align"]`` : the former ones
    ``uns["sthisto"]["alignment"]["spatial"]`` : for each of ``sections`` its ``verdict``, the ``matrix`` (2, 3) that
    was applied, ``statistic`` and ``best_statistic`` before and after it, and ``refined_gain``, the share of
    variance that held-out blocks gained by the deformation, 0 without one

    Raises
    ------
    KeyError, ValueError, OSError
        As :func:`check_alignment`; ValueError also where a section is undecidable and ``force`` is not set.
    TypeError
        A SpatialData, whose elements carry transformations of their own.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(220, random_state=1)
    >>> truth = adata.obsm["spatial"].copy()
    >>> adata.obsm["spatial"] = truth.max(axis=0) - truth
    >>> sthisto.pp.align(adata)
    >>> bool(np.abs(adata.obsm["spatial"] - truth).mean() < 0.25 * 50)  # spots are 50 px apart
    True
    """
    if _data.is_spatialdata(adata):
        raise TypeError(
            "align changes obsm['spatial'] of an AnnData; in a SpatialData positions come from elements. Set the "
            "transformation of the shapes instead: spatialdata.transformations.set_transformation(element, "
            "Affine(matrix, ...)) with the matrix of sthisto.pp.check_alignment."
        )
    options: dict[str, Any] = {"encoder": encoder, "genes": genes, "layer": layer, "mpp": mpp, "pitch_um": pitch_um}
    checked = list(_check_sections(adata, image, library_key, random_state=random_state, **options))
    open_ones = [each for each in checked if each.result.verdict == "undecidable"]
    if open_ones and not force:
        reasons = "; ".join(f"section {each.section.name!r}: {each.result.evidence}" for each in open_ones)
        raise ValueError(
            f"cannot be decided from the data: {reasons} Register the image by hand (napari, Loupe Browser), or apply "
            "the best transformation all the same: force=True."
        )
    xy = np.empty((adata.n_obs, 2))
    matrices, gains, moved = [], [], []
    for each in checked:
        applied = force or each.result.verdict == "misaligned"
        matrix = each.result.transformation.affine if applied else np.eye(2, 3)
        positions = each.section.xy @ matrix[:, :2].T + matrix[:, 2]
        warp = each.warp(positions, random_state) if refine else None
        xy[each.section.rows] = positions if warp is None else warp(positions)
        matrices.append(matrix)
        gains.append(0.0 if warp is None else warp.gain)
        if applied or warp is not None:
            moved.append(each.section.name)
        else:
            logger.info("section %r is aligned and was not moved: %s", each.section.name, each.result.evidence)
    if moved:
        results = [each.result for each in checked]
        record = {
            "sections": np.array([each.section.name for each in checked], dtype=str),
            "verdict": np.array([each.verdict for each in results], dtype=str),
            "matrix": np.stack(matrices),
            "statistic": np.array([each.statistic for each in results]),
            "best_statistic": np.array([each.best_statistic for each in results]),
            "refined_gain": np.array(gains),
        }
        _data.write_aligned(adata, xy, moved, record)


@dataclass(frozen=True, eq=False)
class _Checked:
    """A section, what its check needed, and the result."""

    section: SectionData
    mpp: float
    raster: FeatureRaster
    expression: NDArray[np.float32]
    result: Alignment

    def warp(self, xy: NDArray[np.float64], random_state: int) -> Warp | None:
        """Deformation of positions (n, 2), where it helps."""
        tissue, pitch = xy[self.section.in_tissue], self.section.pitch
        return fit_warp(self.raster, tissue, self.expression, pitch=pitch, random_state=random_state)


def _check_sections(
    adata: "AnnData",
    image: Any,
    library_key: str | None,
    *,
    encoder: str | Encoder,
    genes: list[str] | None,
    layer: str | None,
    mpp: float | None,
    pitch_um: float | None,
    random_state: int,
) -> Iterator[_Checked]:
    loaded, sections = load(encoder), _data.read_sections(adata, library_key)
    names = _data.genes_with_values(adata, _data.genes_to_model(adata, genes), layer)
    for section in sections.values():
        expression = _data.expression(adata, section.rows[section.in_tissue], names, layer)
        opened = _data.open_image_anywhere(adata, section, image, mpp=mpp, pitch_um=pitch_um)
        raster = _raster(section, opened, loaded)
        xy = section.xy[section.in_tissue]
        result = check(raster, xy, expression, pitch=section.pitch, random_state=random_state)
        yield _Checked(section, opened.mpp, raster, expression, result)


def _raster(section: SectionData, opened: SectionImage, encoder: Encoder) -> FeatureRaster:
    """Features of the whole image."""
    image, side, step = opened.image, encoder.patch_um / opened.mpp, STEP * section.pitch
    height, width = image.shape
    return FeatureRaster.of(
        lambda points: encode(image, points, side, encoder),
        (width, height),
        step,
        extent=side,
        tissue=_tissue(opened, step),
    )


def _tissue(opened: SectionImage, step: float) -> NDArray[np.float64] | None:
    if is_blank(opened.image):
        return np.empty((0, 2))
    try:
        return tissue_points(opened.image, step)
    except ValueError as reason:  # stained throughout, or no bright background
        logger.info("the whole image counts as tissue: %s", reason)
        return None


def _row(checked: _Checked) -> dict[str, Any]:
    result, section = checked.result, checked.section
    symmetry, rotation = result.transformation.parts
    center = section.xy[section.in_tissue].mean(axis=0)
    shift = (result.transformation(center[None])[0] - center) / section.pitch
    return {
        "section": section.name,
        "verdict": result.verdict,
        "evidence": result.evidence,
        "statistic": result.statistic,
        "best_statistic": result.best_statistic,
        "p_value": result.p_value,
        "gain_p_value": result.gain_p_value,
        "displacement": result.displacement,
        "displacement_um": result.displacement * section.pitch * checked.mpp,
        "symmetry": symmetry,
        "rotation": rotation,
        "scale": result.transformation.scale,
        "shift_x": shift[0],
        "shift_y": shift[1],
        "matrix": result.transformation.affine,
        "resolution": result.resolution,
        "inside": result.inside,
        "n_spots": result.n_spots,
        "symmetries": result.symmetries,
        "shifts": result.shifts,
        "profile": result.profile,
        "rotations": result.rotations,
        "rotation_profile": result.rotation_profile,
        "scales": result.scales,
        "scale_profile": result.scale_profile,
    }
