"""Images of genes for a dense SpatialData."""

from collections.abc import Iterable
from typing import Any

from sthisto import _data
from sthisto._messages import listed


def rasterize(sdata: Any, genes: str | Iterable[str]) -> None:
    """Draw genes of a dense map as channels of an image, as napari and spatialdata-plot show them.

    Parameters
    ----------
    sdata
        The SpatialData that :func:`upsample` returned.
    genes
        Names of genes in its table.

    Returns
    -------
    None. Writes ``sdata.images["<shapes>_genes"]``, one image for each section: pixels of a third of the pitch, which
    have the value of the nearest point, and 0 outside the map.

    Raises
    ------
    KeyError
        The table "dense" or a gene is missing.

    Examples
    --------
    >>> import sthisto
    >>> sthisto.tl.rasterize(dense_sdata, ["MBP"])  # doctest: +SKIP
    """
    names = [genes] if isinstance(genes, str) else list(genes)
    if "dense" not in sdata.tables:
        raise KeyError(
            f"no table 'dense' in the SpatialData (found: {listed(sdata.tables)}): pass what upsample returned."
        )
    table = sdata.tables["dense"]
    missing = [name for name in names if name not in table.var_names]
    if missing:
        raise KeyError(f"genes {listed(missing)} are not in the map (it has {listed(table.var_names)}).")
    for name, image in _data.rasterized(sdata, names).items():
        sdata.images[name] = image
