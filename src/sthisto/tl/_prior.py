"""Priors as users pass them, as expression at the spots or points of a section."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sthisto import _data, grids
from sthisto._messages import listed, near
from sthisto.models import reads_pixels
from sthisto.models._standardize import pack_names, unpack_names
from sthisto.tl._sections import model_section, restore

if TYPE_CHECKING:
    from anndata import AnnData

SOURCE, FIT = "prior_source", "prior_fit"  # names of arrays in the record of a fit
FAR = 0.1  # share of the points that may be more than a pitch from the prior's
DEFAULT = "sthisto"

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Prior:
    """Expression that is known from elsewhere.

    Attributes
    ----------
    source
        A layer or key of ``obsm``, a callable, an AnnData of points, a raster, or one of these for each section.
    fit
        A fit of other sections, which predicts from image features; ``source`` is None then.
    """

    source: Any = None
    fit: _data.Fit | None = None

    @classmethod
    def of(cls, prior: Any) -> "Prior":
        """Take what a user passed as ``prior=``."""
        fits = _data.records(prior, "fit") if hasattr(prior, "uns") else {}
        if not fits:
            _refuse_unknown(prior)
            return cls(prior)
        if DEFAULT not in fits and len(fits) > 1:
            raise ValueError(f"prior= holds several fits ({listed(fits)}): keep one, or name it {DEFAULT!r}.")
        fit = _data.read_fit(prior, DEFAULT if DEFAULT in fits else next(iter(fits)))
        if reads_pixels(fit.model, restore(fit)) or not fit.features_key:
            raise ValueError(
                f"prior= is a fit of {fit.model!r}, which does not predict from image features. Predict with it first "
                "and pass the layer, or fit 'attention', 'gp' or 'ridge'."
            )
        return cls(fit=fit)

    @classmethod
    def restore(cls, fit: _data.Fit, prior: Any = None) -> "Prior | None":
        """The prior of a fit, None where there is none; what is passed now replaces one that was not recorded."""
        if SOURCE not in fit.arrays:
            if prior is not None:
                raise ValueError("prior=: the model was fitted without one. Pass it to sthisto.tl.fit.")
            return None
        if prior is not None:
            return cls.of(prior)
        if FIT in fit.arrays:
            return cls(fit=_data.fit_from_bytes(np.asarray(fit.arrays[FIT], dtype=np.uint8).tobytes()))
        return cls(unpack_names(fit.arrays[SOURCE])[0])

    def of_spots(self, fit: _data.Fit) -> "Prior":
        """The one that the fit knows its spots by, where that was kept, else this one."""
        recorded = Prior.restore(fit)
        return recorded if recorded is not None and (recorded.fit is not None or recorded.source) else self

    def state(self) -> dict[str, NDArray[np.generic]]:
        """As named arrays: the key or the fit; anything else has to be passed again."""
        key = self.source if isinstance(self.source, str) else ""
        own: dict[str, NDArray[np.generic]] = {SOURCE: pack_names([key])}
        if self.fit is not None:
            own[FIT] = np.frombuffer(_data.fit_to_bytes(self.fit), dtype=np.uint8)
        return own

    def at_spots(
        self, adata: "AnnData", sections: Mapping[str, _data.SectionData], genes: NDArray[np.str_]
    ) -> dict[str, _data.SectionData]:
        """Sections with the prior (n, g) at their spots; NaN columns for genes that it lacks."""
        return {name: replace(each, prior=self._of_spots(adata, each, genes)) for name, each in sections.items()}

    def _of_spots(self, adata: "AnnData", section: _data.SectionData, genes: NDArray[np.str_]) -> Values:
        if isinstance(self.source, str) and self.source:
            return _aligned(_data.predictions_of(adata, self.source, section.rows), genes, repr(self.source))
        return self.at_points(section, section.xy, section.features, genes)

    def at_points(
        self,
        section: _data.SectionData,
        xy: NDArray[np.float64],
        features: Values | None,
        genes: NDArray[np.str_],
    ) -> Values:
        """The prior (m, g) at points (m, 2) of a section, full-resolution pixels."""
        if self.fit is not None:
            return _predicted(self.fit, section, xy, features, genes)
        source = self.source
        if isinstance(source, Mapping):
            if section.name not in source:
                raise KeyError(f"prior= has no section {section.name!r} (found: {listed(source)}).")
            source = source[section.name]
        if isinstance(source, str):
            what = f"the prior {source!r} is known at the spots only" if source else "the fit's prior was not kept"
            raise ValueError(
                f"{what}. Pass prior= with a callable of positions (m, 2), an AnnData of points, or a raster."
            )
        if callable(source):
            return _aligned(_frame(source(xy), len(xy), genes), genes, "prior=")
        table, places = _points(source)
        return _nearest(table, places, xy, genes, section.pitch)


def _refuse_unknown(prior: Any) -> None:
    several = list(prior.values()) if isinstance(prior, Mapping) else [prior]
    for each in several:
        if (
            not (isinstance(each, str) and each)
            and not callable(each)
            and not hasattr(each, "obsm")
            and not _is_raster(each)
        ):
            raise TypeError(
                f"prior={each!r}: expected a layer or key of obsm, a fitted AnnData (sthisto.tl.load reads a saved "
                "one), an AnnData of points, a callable of positions, or a raster with coordinates c, y and x."
            )


def _is_raster(thing: Any) -> bool:
    return {"c", "y", "x"} == set(map(str, getattr(thing, "dims", ())))


def _predicted(
    fit: _data.Fit,
    section: _data.SectionData,
    xy: NDArray[np.float64],
    features: Values | None,
    genes: NDArray[np.str_],
) -> Values:
    """What a fit of other sections predicts from features alone."""
    if features is None or section.features is None:
        raise ValueError(
            f"the prior is a fit of {fit.model!r} and predicts from image features, and section {section.name!r} has "
            "none. Run sthisto.pp.extract_features(adata) as for the prior's own sections."
        )
    _data.compare_settings(fit.feature_settings, section)
    model = restore(fit)
    stained = replace(section, model_key=_data.UNFITTED)
    values = np.maximum(model.predict(model_section(stained, model, xy=xy, features=features)), 0)
    return _aligned(pd.DataFrame(values, columns=fit.genes), genes, "prior=")


def _points(source: Any) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Expression by gene of an AnnData or a raster, and the places (p, 2) it is known at."""
    if hasattr(source, "obsm"):
        rows = np.arange(source.n_obs)
        return _data.predictions_of(source, None, rows), _data.coordinates(source, rows)
    ordered = source.transpose("c", "y", "x")
    missing = [name for name in ("c", "y", "x") if name not in ordered.coords]
    if missing:
        raise ValueError(f"prior=: the raster has no coordinates {listed(missing)}: genes, and pixels of the image.")
    y, x = (np.asarray(ordered.coords[name], dtype=np.float64) for name in ("y", "x"))
    values = np.asarray(ordered.values, dtype=np.float32).reshape(len(ordered.coords["c"]), -1)
    places = np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)
    return pd.DataFrame(values.T, columns=np.asarray(ordered.coords["c"]).astype(str)), places


def _nearest(
    table: pd.DataFrame, places: NDArray[np.float64], xy: NDArray[np.float64], genes: NDArray[np.str_], pitch: float
) -> Values:
    """Values at the nearest place; refuses those of another scale or section."""
    distance, at = grids.nearest(xy, places)
    away = float((distance > pitch).mean())
    if away > FAR:
        raise ValueError(
            f"{away:.0%} of the points are more than a spot's pitch ({pitch:.4g} px) from every place of the prior. "
            "Are its positions in full-resolution pixels of the same image?"
        )
    return _aligned(table.iloc[at[:, 0]], genes, "prior=")


def _frame(values: Any, n: int, genes: NDArray[np.str_]) -> pd.DataFrame:
    """What a callable returned, by gene."""
    if isinstance(values, pd.DataFrame):
        table = values
    else:
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (n, len(genes)):
            raise ValueError(
                f"prior= returned an array of shape {array.shape} for {n} points and {len(genes)} genes of the fit: "
                "return a DataFrame with gene names, or columns in the order of the fit's genes."
            )
        table = pd.DataFrame(array, columns=genes)
    if len(table) != n:
        raise ValueError(f"prior= returned {len(table)} rows for {n} points.")
    return table


def _aligned(table: pd.DataFrame, genes: NDArray[np.str_], what: str) -> Values:
    """Columns (m, g) of the genes, NaN for those that the prior lacks."""
    names = table.columns.astype(str)
    if not names.isin(genes).any():
        raise ValueError(
            f"the prior {what} has none of the {len(genes)} genes to model (its first: {listed(names[:3])}; "
            f"{near(str(genes[0]), names)}). Are both named by symbols, or both by Ensembl ids?"
        )
    columns = names.get_indexer(pd.Index(genes))
    values = np.full((len(table), len(genes)), np.nan, dtype=np.float32)
    values[:, columns >= 0] = table.to_numpy(dtype=np.float32)[:, columns[columns >= 0]]
    known = ~np.isnan(values).all(axis=0)
    if not np.isfinite(values[:, known]).all():
        raise ValueError(f"the prior {what} has NaN or infinite values for some spots or points only.")
    return values
