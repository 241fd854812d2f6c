"""Everything known of a section, from reading alone."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from sthisto import _data

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@_data.accepts_spatialdata(image="image", library_key="library_key")
def check(adata: "AnnData | SpatialData", *, image: Any = None, library_key: str | None = None) -> pd.DataFrame:
    """Report everything known of a section, and what contradicts what.

    The commonest failures are facts that disagree: coordinates of another image, a stale scale, counts for
    log-normalized values, features of another encoder. The verbs run the same checks and refuse or warn; this reports
    all of them at once, from reading alone. Whether the image is flipped or shifted is not among them:
    :func:`check_alignment` computes that.

    Parameters
    ----------
    adata
        Section, at any stage: AnnData, SpatialData or :class:`sthisto.SpatialDataView`.
    image
        Image that the coordinates refer to, as in :func:`extract_features`.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.

    Returns
    -------
    Table with one row a check: ``section`` ("" for the whole object), ``check``, ``status`` (``"ok"``, ``"guessed"``
    where an assumption was made, ``"contradictory"``, ``"missing"``), ``value``, what is there, and ``advice``, what to
    do. Nothing is written.

    Raises
    ------
    KeyError
        No coordinates, or no column ``library_key``.
    ValueError
        Coordinates that cannot be read, or several sections without ``library_key``.

    Examples
    --------
    >>> import sthisto
    >>> report = sthisto.pp.check(sthisto.datasets.synthetic())
    >>> report.loc[report["check"] == "scale", "status"].tolist()
    ['ok']
    """
    sections = _data.read_sections(adata, library_key)
    rows = [("", _data.expression_finding(adata))]
    rows += [("", each) for each in _data.record_findings(adata, sections)]
    for name, section in sections.items():
        rows += [(name, each) for each in _data.section_findings(adata, section, image)]
    return pd.DataFrame([{"section": name, **vars(finding)} for name, finding in rows])
