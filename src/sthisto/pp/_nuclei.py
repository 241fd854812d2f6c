"""Nuclei of a section, as points to predict at."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sthisto import _data
from sthisto.images import find_nuclei as nuclei_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@_data.accepts_spatialdata(
    image="image", library_key="library_key", images_of="features_key", kind="features", new_rows=True
)
def find_nuclei(
    adata: "AnnData | SpatialData",
    *,
    image: Any = None,
    library_key: str | None = None,
    max_distance: float | None = None,
    min_area_um2: float = 15.0,
    max_area_um2: float = 400.0,
    mpp: float | None = None,
    features_key: str = "X_histo",
) -> "AnnData":
    """Find the nuclei of a section in its image, to predict expression at each with ``tl.upsample``.

    A plain method without training (:func:`sthisto.images.find_nuclei`: stain separation, thresholds, watershed). It is
    made for hematoxylin and eosin, good for positions and counts and less so for outlines; where a segmentation
    validated for your stain exists, pass that to :func:`sthisto.tl.upsample` instead.

    Parameters
    ----------
    adata
        Section with spot centers in ``obsm["spatial"]``, (n, 2) full-resolution pixels, x then y.
    image
        Image that the coordinates refer to, as in :func:`extract_features`; ``None`` takes that of the features, else
        the sharpest there is. Its pixels may be 1.1 um wide at most.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    max_distance
        Nuclei further than this from every spot in tissue are left out, full-resolution pixels. ``None``: one pitch;
        ``numpy.inf`` keeps all.
    min_area_um2, max_area_um2
        Smallest and largest area of a nucleus, square micrometers.
    mpp
        Micrometers per full-resolution pixel; ``None`` derives it, as :func:`extract_features` does.
    features_key
        Features in ``obsm`` whose image and scale are taken where neither is given.

    Returns
    -------
    AnnData, one row a nucleus and no genes: ``obsm["spatial"]`` (m, 2) full-resolution pixels, of a SpatialData the
    coordinates of the shapes; ``obs["area_um2"]``; ``obs["roundness"]``, 1 for a disc and less for a spindle;
    ``obs["hematoxylin"]``, the mean optical density; ``obs[library_key]``; ``uns["spatial"]`` as in ``adata``, with the
    nuclei's median diameter as spot diameter. Nothing is written into ``adata``.

    Raises
    ------
    KeyError
        No spot coordinates, no image, or no column ``library_key``.
    ValueError
        Pixels larger than about 1 um; an image without tissue or without a nucleus near the spots; spots outside the
        image; a scale that is unknown or contradicted.

    References
    ----------
    Ruifrok & Johnston (2001), Quantification of histochemical staining by color deconvolution.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, mpp=1.0)
    >>> nuclei = sthisto.pp.find_nuclei(adata)
    >>> sorted(nuclei.obs), nuclei.n_obs > 10 * adata.n_obs
    (['area_um2', 'hematoxylin', 'roundness'], True)
    """
    sections = _data.add_metadata(adata, _data.read_sections(adata, library_key), features_key)
    tables, xy, diameters = [], [], {}
    for name, section in sections.items():
        recorded = image is None and mpp is None and section.metadata is not None
        opened = (
            _data.open_feature_image(adata, section)
            if recorded
            else _data.open_section_image(adata, section, image, mpp=mpp)
        )
        found = nuclei_of(
            opened.image,
            opened.mpp,
            near=section.xy[section.in_tissue],
            max_distance=section.pitch if max_distance is None else max_distance,
            min_area_um2=min_area_um2,
            max_area_um2=max_area_um2,
        )
        if not len(found):
            raise ValueError(
                f"no nuclei of {min_area_um2:g} to {max_area_um2:g} square um near the spots of section {name!r}, at "
                f"{opened.mpp:.4g} um per full-resolution pixel. Are image=, mpp= and max_distance= right?"
            )
        table = pd.DataFrame({column: getattr(found, column) for column in ("area_um2", "roundness", "hematoxylin")})
        table.index = table.index.astype(str)
        if library_key is not None:
            table[library_key], table.index = name, name + "_" + table.index
        tables.append(table)
        xy.append(found.xy)
        diameters[name] = 2 * float(np.sqrt(np.median(found.area_um2) / np.pi)) / opened.mpp
    obs = pd.concat(tables).astype({} if library_key is None else {library_key: "category"})
    nothing = np.empty((len(obs), 0), np.float32)
    return _data.new_object(adata, np.array([], str), {"": nothing}, obs, np.concatenate(xy), diameters=diameters)
