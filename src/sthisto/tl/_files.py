"""Fitted models as files."""

from os import PathLike
from typing import TYPE_CHECKING

from sthisto import _data

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@_data.accepts_spatialdata()
def save(adata: "AnnData | SpatialData", path: str | PathLike[str], *, key: str = "sthisto") -> None:
    """Write the fitted model as one safetensors file, without the section it was fitted on.

    The file holds the model's arrays and, as metadata, its settings: enough for ``predict(stained, reference=...)`` on
    another machine. Names of genes, sections and training spots are in it.

    Parameters
    ----------
    adata
        A fitted section.
    path
        File to write; one that is there is replaced once the new one is whole.
    key
        Name of the fit.

    Raises
    ------
    KeyError
        Not fitted.

    Examples
    --------
    >>> import sthisto, tempfile, pathlib
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.tl.fit(adata, "idw")
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fit.safetensors"
    >>> sthisto.tl.save(adata, path)
    >>> sthisto.tl.load(path).n_vars
    60
    """
    _data.save_fit(_data.read_fit(adata, key), path)


@_data.accepts_spatialdata()
def load(
    path: str | PathLike[str],
    adata: "AnnData | SpatialData | _data.SpatialDataView | None" = None,
    *,
    key_added: str = "sthisto",
) -> "AnnData | None":
    """Read a model that :func:`save` wrote.

    Parameters
    ----------
    path
        The file.
    adata
        Object to put the fit into, one that has the training section's spots and genes; ``None`` makes an empty one.
    key_added
        Name of the fit.

    Returns
    -------
    Nothing with ``adata``, whose ``uns["sthisto"]["fit"][key_added]`` is written; else an AnnData without spots that
    holds the fit, to be passed as ``reference=``.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        The file is damaged, no fit, or of a newer schema.

    Examples
    --------
    >>> import sthisto, tempfile, pathlib
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.tl.fit(adata, "idw")
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fit.safetensors"
    >>> sthisto.tl.save(adata, path)
    >>> again = sthisto.datasets.synthetic()
    >>> sthisto.tl.load(path, again)
    >>> sthisto.tl.upsample(again, 2).n_vars
    60
    """
    _data.check_key(key_added)
    fit_record = _data.load_fit(path)
    if adata is not None:
        _data.write_fit(adata, key_added, fit_record)
        return None
    empty = _data.empty_object(fit_record.genes)
    _data.write_fit(empty, key_added, fit_record)
    return empty
