"""Learn expression from tissue."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sthisto import _data
from sthisto.models import MODELS, Model, Section, build, reads_pixels

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

from sthisto.tl._gene_test import folds_of, judge
from sthisto.tl._sections import Pixels, section_of
from sthisto.tl._uncertainty import UncertaintyModel


@_data.accepts_spatialdata
def fit(  # noqa: PLR0913  what a fit can be told, all with defaults
    adata: "AnnData | SpatialData",
    model: str = "attention",
    *,
    features_key: str = "X_histo",
    layer: str | None = None,
    genes: Iterable[str] | None = None,
    train_on: str | NDArray[np.bool_] | None = None,
    library_key: str | None = None,
    image: Any = None,
    params: Mapping[str, Any] | None = None,
    test_genes: bool = False,
    random_state: int = 0,
    device: str | None = None,
    key_added: str = "sthisto",
    progress: bool = True,
    table_key: str | None = None,
    image_key: str | None = None,
) -> None:
    """Learn expression from image features, positions and the measured spots around.

    Several sections are learnt together: features are standardised and gene means taken per section, and what is
    learnt is shared. Positions count within a section; the attention model also lays sections of one tissue over each
    other where their expression clearly says how, and lets none speak that does not fit. Spots outside ``train_on`` are
    never seen, neither as target nor as context.

    Parameters
    ----------
    adata
        Section with log-normalised expression, spot centres in ``obsm["spatial"]`` and image features in ``obsm``.
    model
        Name in :data:`sthisto.models.MODELS`.
    features_key
        Features (n, d) in ``obsm``, from :func:`sthisto.pp.extract_features` or elsewhere.
    layer
        Layer with log-normalised expression; ``None`` reads ``X``.
    genes
        Genes to model; ``None`` takes ``var["highly_variable"]`` where present, else all.
    train_on
        Boolean column of ``obs``, or mask (n,): the spots that may be learnt from.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    image
        Picture for models that read pixels: a path, an array, ``"hires"`` or ``"lowres"`` of ``uns["spatial"]``, or
        ``{library: picture}``. ``None`` takes the one that the features were taken from, else the sharpest in
        ``uns["spatial"]``. A path is kept as it is given; an array has to be passed again to predict.
    params
        Settings of the model; every iterative one takes ``{"epochs": n}``.
    test_genes
        Also tell which genes to believe: fit five times more, each time without a fifth of the spots in whole blocks,
        and compare each gene with patterns as smooth as its own. Takes about five times as long as the fit alone, and
        a few seconds a section; needs features in ``obsm[features_key]``.
    random_state
        Seed; the same seed gives the same bits on a CPU.
    device
        Where networks train, as torch names it; ``None`` takes a GPU where there is one.
    key_added
        Name of the fit, also of the layers that :func:`predict` writes.
    progress
        Show progress bars.
    table_key, image_key
        Names of the table and of the image where ``adata`` is a SpatialData that has several.

    Returns
    -------
    Nothing. Writes

    ``uns["sthisto"]["fit"][key_added]`` : the fitted model as plain arrays, its settings and its training curves

    With ``test_genes`` also, NaN for genes that are not modelled,

    ``var["pcc_heldout"]``, ``var["pcc_heldout_std"]`` : Pearson r on spots that were left out in blocks, mean over
    sections, and its standard deviation over folds and sections

    ``var["pvalue_heldout"]``, ``var["qvalue_heldout"]`` : whether the look of the tissue foretells the gene better than
    patterns of the same autocorrelation (:class:`sthisto.uncertainty.SurrogateTest`), and the same after Benjamini and
    Hochberg: among the genes below 0.05 at most 5 % are expected to be false. The pictures of ``pl`` warn of the others

    Raises
    ------
    KeyError
        Unknown model, gene, layer or column; no coordinates or features; no image for a model that reads pixels.
    TypeError
        ``params`` that no file could keep.
    ValueError
        Raw counts, NaN, negative or infinite values, several sections without ``library_key``, unknown params, too
        few spots; spots outside the image or an image of unknown scale.

    References
    ----------
    The attention model goes beyond HisToSGE (arXiv 2407.20518), whose own is ``model="histosge"``; each model's module
    gives its paper and equations.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata, progress=False)
    >>> sthisto.tl.fit(adata, "ridge", progress=False)
    >>> sthisto.tl.predict(adata)
    >>> adata.layers["sthisto"].shape == adata.shape
    True
    """
    _data.check_key(key_added)
    settings = _data.plain_params(params)
    built, spec = build(model, settings), MODELS[model]
    reads_features = "features" in spec.inputs
    chosen = _data.genes_to_model(adata, genes)
    places = _training_places(adata, library_key, train_on)
    _refuse_few(places, model, spec.min_spots)
    measured = [_data.expression(adata, place.rows, chosen, layer) for place in places.values()]
    pixels = [
        Pixels.find(adata, name, place, image, features_key) if reads_pixels(model, built) else None
        for name, place in places.items()
    ]
    around = [
        each.around(place.xy, built) if each else None for place, each in zip(places.values(), pixels, strict=True)
    ]
    read_key = features_key if reads_features else ""
    sections = [
        replace(section_of(adata, place, read_key, patches), expression=expression)
        for place, patches, expression in zip(places.values(), around, measured, strict=True)
    ]
    looks = _with_looks(adata, sections, places, features_key) if test_genes and not reads_features else sections
    folds = folds_of(sections, random_state, spec.min_spots) if test_genes else []
    held_back = built.fit(sections, random_state=random_state, device=device or "", progress=progress)

    def again(parts: Sequence[Section]) -> Model:
        other = build(model, settings)
        other.fit(parts, random_state=random_state, device=device or "", progress=False)
        return other

    trust = UncertaintyModel.fit(
        sections,
        held_back,
        with_features=reads_features,
        again=None if spec.iterative else again,
        least=spec.min_spots,
        random_state=random_state,
    )
    verdict = judge(sections, looks, folds, again=again, random_state=random_state) if test_genes else {}
    record = _data.Fit(
        model=model,
        params=settings,
        genes=chosen,
        libraries=np.array(list(places), dtype=str),
        library_key=library_key or "",
        features_key=read_key,
        layer=layer or "",
        random_state=int(random_state),
        pitch=np.array([place.pitch for place in places.values()]),
        spots=adata.obs_names[np.concatenate([place.rows for place in places.values()])].to_numpy().astype(str),
        xy=np.concatenate([place.xy for place in places.values()]),
        arrays={**built.state(), **trust.state(), **Pixels.state(pixels)},
        history=built.history,
    )
    _data.write_fit(adata, key_added, record)
    _data.write_judgement(adata, chosen, verdict)


def _training_places(
    adata: "AnnData", library_key: str | None, train_on: str | NDArray[np.bool_] | None
) -> dict[str, _data.Place]:
    """Find the spots that may be learnt from, section by section."""
    training = _data.training_rows(adata, train_on)
    places = {name: place.keep(training) for name, place in _data.places(adata, library_key).items()}
    return {name: place for name, place in places.items() if len(place.rows)}


def _with_looks(
    adata: "AnnData", sections: Sequence[Section], places: Mapping[str, _data.Place], features_key: str
) -> list[Section]:
    """Sections with the features that genes are judged by, of a model that reads none."""
    looks = [_data.features(adata, features_key, place.rows) for place in places.values()]
    return [replace(section, features=look) for section, look in zip(sections, looks, strict=True)]


def _refuse_few(places: Mapping[str, _data.Place], model: str, least: int) -> None:
    n = sum(len(place.rows) for place in places.values())
    if n < least:
        raise ValueError(f"{n} training spots; model {model!r} needs at least {least}. Is train_on= right?")
    lone = [name for name, place in places.items() if len(place.rows) < 2]
    if lone:
        raise ValueError(f"a single training spot in section {', '.join(map(repr, lone))}: leave it out, or add spots.")
