"""Public Visium sections of the HisToSGE paper, downloaded once and checked.

Each section is kept as Space Ranger writes it (``filtered_feature_bc_matrix.h5``, ``spatial/``) next to its
full-resolution image, so that ``squidpy.read.visium`` reads the folder too.
"""

import os
import tarfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from sthisto.datasets._download import data_folder, fetch
from sthisto.images import open_image

__all__ = ["breast_cancer", "breast_dcis", "dlpfc", "mouse_brain", "olfactory_bulb"]

SPATIAL_LIBD = "https://spatial-dlpfc.s3.us-east-2.amazonaws.com"
HUMAN_PILOT = "https://raw.githubusercontent.com/LieberInstitute/HumanPilot/master/10X"
ST_UTILITY = (
    "https://raw.githubusercontent.com/jbergenstrahle/STUtility/9a8f421499e58b13340ee386db07b0eba923c88c"
    "/inst/extdata/counts"
)
TEN_X = "https://exampledata.scverse.org/squidpy/10x_genomics"  # where squidpy.datasets.visium has them
COUNTS, IMAGE, ARCHIVE = "filtered_feature_bc_matrix.h5", "image.tif", "spatial.tar.gz"
POSITIONS, SCALES = "spatial/tissue_positions_list.csv", "spatial/scalefactors_json.json"
LAYERS = "barcode_level_layer_map.tsv"

SPOTS: dict[str, int] = {  # under tissue, of every section of the cortex
    "151507": 4226,
    "151508": 4384,
    "151509": 4789,
    "151510": 4634,
    "151669": 3661,
    "151670": 3498,
    "151671": 4110,
    "151672": 4015,
    "151673": 3639,
    "151674": 3673,
    "151675": 3592,
    "151676": 3460,
}


@dataclass(frozen=True)
class _Files:
    """Where the files of a section come from and what is known of them."""

    urls: Mapping[str, str]  # by their path in the section's folder
    n_spots: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


BULBS = {
    "MOB1": {
        "MOB1.tsv": "82c0691f800355369fd8a72ff44ba1e3112d4e44a790f490a9fa267876a9352e",
        "MOB1.jpg": "c1c292187221bab077ac1b15e95cf665db35684c98d6193af56d2e8b7772fe20",
        "alignment_table_MOB1.tsv": "91ade06cf93bc0b3cd728846c34e310a8365200d1ad33498e6a0eb6951a92164",
    },
    "MOB2": {
        "MOB2.tsv": "449dcc351ede5c63f9afe313479dbb830ba32c6e86b56b258276304102d1f7e9",
        "MOB2.jpg": "1079fe52f600ec212a6a59cef76b8697fcd776d0cdb10461ad3bb738eaa5c0b6",
        "alignment_table_MOB2.tsv": "6d86b226386b0a08f825b3bff4b5c359f00fd52d3f53d77db0376b0f7e0ec30d",
    },
}
MOUSE_BRAIN = "V1_Adult_Mouse_Brain"
BREAST_CANCER = "V1_Breast_Cancer_Block_A_Section_1"
BREAST_DCIS = "Visium_FFPE_Human_Breast_Cancer"
SHA256 = {
    MOUSE_BRAIN: {
        COUNTS: "eb78379e02dcf48036abf05b67233e73ecb0d880787feb82f76ff16f6ce01eb3",
        ARCHIVE: "46d6b05ba740f232d6bf4b27b9a8846815851e000985fb878f1364bab04e5bd4",
        IMAGE: "39d0a85a7cecb0bde9ad2566260d571bb49834d26fc443cb32b96475f30668b2",
    },
    BREAST_CANCER: {
        COUNTS: "b3cbb6ead60afad848ebcc07a34835613d9d2d79e416ad8300b210d9de584b65",
        ARCHIVE: "415530a9d31172f63fd358d5d1cefb0798698ef9c0e614f52825894cd45c61bf",
        IMAGE: "73a94ca956d1b5c027dcaf1ac42c15fed4d4a12eefee4b4b597e62f34cc5959e",
    },
    BREAST_DCIS: {
        COUNTS: "64321f603f7200b0bedffbe353c04dde72bbe7c7be7390e503d955aa9b2584c5",
        ARCHIVE: "2937fcc44b7adee70f162a9e09857410dcf22eed89a3e3187950dfc1574fea14",
        IMAGE: "b3fbbdb5006769ef7d2b614171e208b6caf901bde52272a02da6e3d019626ce0",
    },
}


def dlpfc(
    section: str = "151673",
    *,
    fullres: bool = True,
    folder: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> AnnData:
    """Load a section of the human dorsolateral prefrontal cortex, with its labelled layers (10x Visium).

    Twelve sections of three donors, whose six layers and white matter were labelled by hand: the data on which most
    methods for spatial domains, and the experiments of the HisToSGE paper, are evaluated.

    Parameters
    ----------
    section
        One of 151507 to 151510, 151669 to 151672, 151673 to 151676 (a row a donor).
    fullres
        Also download the full-resolution image (about half a gigabyte), which ``extract_features`` then takes.
        Without it there is the ``hires`` picture of 2 000 px.
    folder
        Where files are kept; ``None`` takes the environment's ``STHISTO_DATA``, else the user's cache.
        What is there is never downloaded again, so a filled folder works offline.
    base_url
        A mirror to download from, that has ``<host>/<path>`` of the public addresses (as ``wget -x`` makes it);
        ``None`` takes the environment's ``STHISTO_DATA_URL``, else the public addresses.
    progress
        Show progress bars.

    Returns
    -------
    ``X``
        (n, 33 538) CSR float32, log1p of counts per 10 000; ``layers["counts"]`` the counts
    ``obs``
        ``layer`` (categorical: L1 to L6, WM, NaN where nobody labelled), ``array_row``, ``array_col``, ``in_tissue``
    ``var``
        ``gene_ids`` (Ensembl); the index has symbols, made unique
    ``obsm["spatial"]``
        (n, 2) pixels of the full-resolution image, x then y
    ``uns["spatial"][section]``
        ``hires`` and ``lowres`` pictures, scale factors, and the path of the full-resolution image as
        ``metadata["source_image_path"]``

    Raises
    ------
    KeyError
        No such section.
    ConnectionError
        No network; the message names the file and the folder. What has come is kept for the next call.
    OSError
        The server does not have the file.
    ValueError
        A file is not what it should be: checksum, number of spots, or shape of the image.

    References
    ----------
    Maynard et al., Transcriptome-scale spatial gene expression in the human dorsolateral prefrontal cortex, Nature
    Neuroscience 24 (2021); files of spatialLIBD and LieberInstitute/HumanPilot (Artistic-2.0).

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.dlpfc("151673")  # doctest: +SKIP
    >>> sthisto.pp.extract_features(adata)  # doctest: +SKIP
    """
    if section not in SPOTS:
        raise KeyError(f"no section {section!r} of the cortex (found: {', '.join(SPOTS)}).")
    home = data_folder(folder) / "dlpfc"
    images = f"{SPATIAL_LIBD}/images/{section}"
    files = _Files(
        n_spots=SPOTS[section],
        urls={
            COUNTS: f"{SPATIAL_LIBD}/h5/{section}_filtered_feature_bc_matrix.h5",
            POSITIONS: f"{HUMAN_PILOT}/{section}/tissue_positions_list.txt",
            SCALES: f"{HUMAN_PILOT}/{section}/scalefactors_json.json",
            "spatial/tissue_hires_image.png": f"{images}_tissue_hires_image.png",
            "spatial/tissue_lowres_image.png": f"{images}_tissue_lowres_image.png",
            IMAGE: f"{images}_full_image.tif",
        },
    )
    layers = fetch(_mirrored(f"{HUMAN_PILOT}/{LAYERS}", base_url), home / LAYERS, progress=progress)
    adata = _load(section, home / section, files, fullres=fullres, base_url=base_url, progress=progress)
    adata.obs["layer"] = _labels(layers, section, adata.obs_names)
    return adata


def mouse_brain(
    *,
    fullres: bool = True,
    folder: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> AnnData:
    """Load the coronal section of an adult mouse brain (10x Visium, V1_Adult_Mouse_Brain).

    Its regions are sharply bounded and visible in the stain. Parameters, result and errors are those of
    :func:`dlpfc`, without labels; the files are those of ``squidpy.datasets.visium``, with the same checksums.

    Parameters
    ----------
    fullres, folder, base_url, progress
        As in :func:`dlpfc`.

    Returns
    -------
    As of :func:`dlpfc`, without ``obs["layer"]``; the section is called ``"V1_Adult_Mouse_Brain"``.

    Raises
    ------
    ConnectionError, OSError, ValueError
        As in :func:`dlpfc`.

    References
    ----------
    10x Genomics, Mouse Brain Section (Coronal), Space Ranger 1.1.0 (CC BY 4.0).

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.mouse_brain()  # doctest: +SKIP
    """
    return _ten_x(MOUSE_BRAIN, fullres=fullres, folder=folder, base_url=base_url, progress=progress)


def breast_cancer(
    *,
    fullres: bool = True,
    folder: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> AnnData:
    """Load a section of invasive ductal carcinoma (10x Visium, V1_Breast_Cancer_Block_A_Section_1).

    The paper's BC1. Parameters, result and errors are those of :func:`dlpfc`, without labels; the files are those of
    ``squidpy.datasets.visium``, with the same checksums.

    Parameters
    ----------
    fullres, folder, base_url, progress
        As in :func:`dlpfc`.

    Returns
    -------
    As of :func:`dlpfc`, without ``obs["layer"]``; the section is called ``"V1_Breast_Cancer_Block_A_Section_1"``.

    Raises
    ------
    ConnectionError, OSError, ValueError
        As in :func:`dlpfc`.

    References
    ----------
    10x Genomics, Human Breast Cancer (Block A Section 1), Space Ranger 1.1.0 (CC BY 4.0).

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.breast_cancer()  # doctest: +SKIP
    """
    return _ten_x(BREAST_CANCER, fullres=fullres, folder=folder, base_url=base_url, progress=progress)


def breast_dcis(
    *,
    fullres: bool = True,
    folder: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> AnnData:
    """Load a section of ductal carcinoma in situ (10x Visium for FFPE, Visium_FFPE_Human_Breast_Cancer).

    The paper's BC2. Parameters, result and errors are those of :func:`dlpfc`, without labels; the files are those of
    ``squidpy.datasets.visium``, with the same checksums.

    Parameters
    ----------
    fullres, folder, base_url, progress
        As in :func:`dlpfc`.

    Returns
    -------
    As of :func:`dlpfc`, without ``obs["layer"]``; the section is called ``"Visium_FFPE_Human_Breast_Cancer"``.

    Raises
    ------
    ConnectionError, OSError, ValueError
        As in :func:`dlpfc`.

    References
    ----------
    10x Genomics, Human Breast Cancer: Ductal Carcinoma In Situ, Invasive Carcinoma (FFPE), Space Ranger 1.3.0
    (CC BY 4.0).

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.breast_dcis()  # doctest: +SKIP
    """
    return _ten_x(BREAST_DCIS, fullres=fullres, folder=folder, base_url=base_url, progress=progress)


def olfactory_bulb(
    section: str = "MOB1",
    *,
    folder: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> AnnData:
    """Load a section of a mouse olfactory bulb (Spatial Transcriptomics array, 200 um pitch).

    Two serial sections, small enough (4.3 MB each) for tutorials and tests of several sections.

    Parameters
    ----------
    section
        ``"MOB1"`` (379 spots) or ``"MOB2"`` (407 spots).
    folder, base_url, progress
        As in :func:`dlpfc`.

    Returns
    -------
    ``X``
        (n, 1 000) CSR float32, log1p of counts per 10 000; ``layers["counts"]`` the counts
    ``obs``
        ``array_row``, ``array_col``
    ``obsm["spatial"]``
        (n, 2) pixels of the image, x then y
    ``uns["spatial"][section]``
        the image (1 905 x 1 905 px) as ``hires``, and its scale factors

    Raises
    ------
    KeyError
        No such section.
    ConnectionError, OSError, ValueError
        As in :func:`dlpfc`.

    References
    ----------
    Stahl et al., Visualization and analysis of gene expression in tissue sections by spatial transcriptomics, Science
    353 (2016), as distributed by jbergenstrahle/STUtility (MIT).

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.olfactory_bulb("MOB1")  # doctest: +SKIP
    >>> sthisto.pp.extract_features(adata, pitch_um=200)  # doctest: +SKIP
    """
    if section not in BULBS:
        raise KeyError(f"no section {section!r} of the olfactory bulb (available: {', '.join(BULBS)}).")
    home = data_folder(folder) / "olfactory_bulb"
    counts, image, positions = (
        fetch(_mirrored(f"{ST_UTILITY}/{file}", base_url), home / file, sha256=sha256, progress=progress)
        for file, sha256 in BULBS[section].items()
    )
    table = pd.read_csv(counts, sep="\t", index_col=0)
    spots = pd.read_csv(positions, sep="\t").query("selected == 1")
    spots.index = pd.Index(spots["x"].astype(str) + "x" + spots["y"].astype(str))
    spots = spots[spots.index.isin(table.index)]
    adata = AnnData(
        csr_matrix(table.loc[spots.index].to_numpy(np.float32)),
        obs=spots[["y", "x"]].set_axis(["array_row", "array_col"], axis=1),
        var=pd.DataFrame(index=table.columns),
        obsm={"spatial": spots[["pixel_x", "pixel_y"]].to_numpy(np.float64)},
    )
    pixels, _ = open_image(image).thumbnail(max_side=2000)
    entry = {"images": {"hires": pixels}, "scalefactors": {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 15.9}}
    adata.uns["spatial"] = {section: entry}
    return _normalised(adata)


def _ten_x(
    name: str, *, fullres: bool, folder: str | os.PathLike[str] | None, base_url: str | None, progress: bool
) -> AnnData:
    urls = {file: f"{TEN_X}/{name}/{name}_{file}" for file in (COUNTS, ARCHIVE, IMAGE)}
    files = _Files(urls, sha256=SHA256[name])
    return _load(name, data_folder(folder) / name, files, fullres=fullres, base_url=base_url, progress=progress)


def _load(name: str, home: Path, files: _Files, *, fullres: bool, base_url: str | None, progress: bool) -> AnnData:
    """Have the files of a section, read them, and check that they belong together."""
    for file, url in files.urls.items():
        if file == IMAGE and not fullres:
            continue
        if file == ARCHIVE and (home / SCALES).exists():  # unpacked before
            continue
        path = fetch(_mirrored(url, base_url), home / file, sha256=files.sha256.get(file), progress=progress)
        if file == ARCHIVE:
            with tarfile.open(path) as archive:
                archive.extractall(home, filter="data")
    adata = _read(name, home, fullres=fullres)
    _check_spots(adata, name, home, files.n_spots)
    if fullres:
        _check_image(adata, name, home / IMAGE)
    return _normalised(adata)


def _read(name: str, home: Path, *, fullres: bool) -> AnnData:
    import squidpy  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # they are made so
        adata = squidpy.read.visium(home, library_id=name, source_image_path=home / IMAGE if fullres else None)
    adata.var_names_make_unique()
    return adata


def _check_spots(adata: AnnData, name: str, home: Path, expected: int | None) -> None:
    lost = int(adata.obs["in_tissue"].isna().sum())
    if lost:
        raise ValueError(
            f"{lost} of {adata.n_obs} spots of {home / COUNTS} have no place in {home / 'spatial'}: they are of "
            "different sections. Delete the folder and load again."
        )
    if expected is not None and adata.n_obs != expected:
        raise ValueError(
            f"{home / COUNTS} has {adata.n_obs} spots, but section {name} has {expected}. Delete it and load again."
        )


def _check_image(adata: AnnData, name: str, path: Path) -> None:
    """Hold the image's shape against that of the small picture that Space Ranger made of it."""
    entry = adata.uns["spatial"][name]
    height, width = open_image(path).shape
    factor = entry["scalefactors"]["tissue_hires_scalef"]
    small_height, small_width = entry["images"]["hires"].shape[:2]
    if max(abs(width * factor - small_width), abs(height * factor - small_height)) > 2:
        raise ValueError(
            f"{path} is {width:.0f} x {height:.0f} px, which at the scale {factor:.4g} does not give the "
            f"{small_width} x {small_height} px of its hires picture: it belongs to another section. "
            "Delete it and load again."
        )


def _normalised(adata: AnnData) -> AnnData:
    import scanpy  # noqa: PLC0415

    adata.layers["counts"] = adata.X.copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    return adata


def _labels(path: Path, section: str, spots: pd.Index) -> pd.Categorical:
    table = pd.read_csv(path, sep="\t", header=None, names=["spot", "section", "layer"], dtype=str)
    layer = table[table["section"] == section].set_index("spot")["layer"].reindex(spots)
    if layer.isna().all():
        raise ValueError(f"{path} has no labels for section {section}. Delete it and load again.")
    return pd.Categorical(layer, categories=sorted(table["layer"].dropna().unique()))


def _mirrored(url: str, base_url: str | None) -> str:
    base = base_url or os.environ.get("STHISTO_DATA_URL")
    place = urlsplit(url)
    return f"{base.rstrip('/')}/{place.netloc}{place.path}" if base else url
