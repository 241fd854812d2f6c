"""How far to trust a fit's predictions: learnt beside the model, kept with it, asked wherever it predicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sthisto import _data, grids
from sthisto.models import Model, Section
from sthisto.models._standardize import expression_of, features_of
from sthisto.uncertainty import Calibration, Covariates, HeldOutPredictions, NoveltyDetector

BLOCK = 4.0  # pitches: side of the blocks that are held back
SHARE = 0.3  # of the spots, held back in blocks
MOST_SECTIONS = 4  # fitted once more without the blocks,
MOST_SPOTS = 1000  # with so many spots in all: what is learnt there are four numbers
ENOUGH_SPOTS = 5000  # for the distribution about the predictions

Floats = NDArray[np.float64]
Means = NDArray[np.float32]


@dataclass(frozen=True)
class UncertaintyModel:
    """Calibration of a fit, and what its training spots were like."""

    calibration: Calibration
    familiar: NoveltyDetector | None  # None: the model reads no features
    xy: list[Floats]  # (n, 2) of each section, pitches
    names: list[str]  # of the sections

    @classmethod
    def fit(
        cls,
        sections: Sequence[Section],
        held_back: Sequence[Means],
        *,
        with_features: bool,
        again: Callable[[Sequence[Section]], Model] | None,
        least: int,
        random_state: int,
    ) -> "UncertaintyModel":
        """Learn from predictions that were held back.

        Parameters
        ----------
        sections
            Training spots with expression.
        held_back
            (n, g) of each section, what the model said of each spot without having seen it.
        with_features
            The model reads features.
        again
            Fits another model like it on a part of the sections; ``None`` where that would take too long.
        least
            Spots that it needs.
        random_state
            Of the spots that are held back in blocks.
        """
        familiar = (
            NoveltyDetector.fit([features_of(each) for each in sections], random_state=random_state)
            if with_features
            else None
        )
        missed = []
        for i, (section, predicted) in enumerate(zip(sections, held_back, strict=True)):
            rows = _enough(predicted, -(-ENOUGH_SPOTS // len(sections)), random_state)
            unlike = _unlike(familiar, section.keep(rows), i, seen=True)
            looked = Covariates(grids.nearest(section.xy[rows], section.xy, k=2)[0][:, 1], unlike)
            missed.append(HeldOutPredictions(expression_of(section)[rows], predicted[rows], looked))
        blocks = again and _in_blocks(sections, again, least, random_state, with_features=with_features)
        xy, names = [section.xy for section in sections], [section.name for section in sections]
        return cls(Calibration.fit(HeldOutPredictions.join(missed), blocks), familiar, xy, names)

    def look(self, points: Section) -> Covariates:
        """How far the points (m,) lie from training spots, and how unusual they look."""
        at = self.names.index(points.name) if points.name in self.names else -1
        distance = grids.nearest(points.xy, self.xy[at])[0][:, 0] if at >= 0 else np.full(len(points), np.inf)
        return Covariates(distance, _unlike(self.familiar, points, at))

    def extrapolated(self, looked: Covariates) -> NDArray[np.bool_]:
        """Tell which points (m,) are far from anything seen, by place or by look.

        By place: further from measured spots than any that was held back. A section without measured spots has no
        such distance, and there the look alone counts.
        """
        away = np.isfinite(looked.distance) & (looked.distance > self.calibration.reach.tested * (1 + 1e-6))
        return away if self.familiar is None else away | self.familiar.unusual(looked.unlike)

    def layers(self, mean: Means, looked: Covariates, interval: float | None) -> dict[str, Means]:
        """Give the standard deviation (m, g) of a new measurement, and bounds of an interval where asked for."""
        layers = {"std": self.calibration.std(mean, looked)}
        if interval is not None:
            layers["low"], layers["high"] = self.calibration.interval(mean, looked, interval)
        return layers

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays, but places and names, which the fit has."""
        own = {} if self.familiar is None else self.familiar.state()
        return {**self.calibration.state(), **own, "trust_spots": np.array([len(xy) for xy in self.xy])}

    @classmethod
    def restore(cls, found: _data.Fit) -> "UncertaintyModel":
        """Take it out of a fit.

        Raises
        ------
        ValueError
            The fit is of an earlier version, which did not learn it.
        """
        if "trust_spots" not in found.arrays:
            raise ValueError("the model was fitted by an earlier sthisto, without calibrated uncertainty. Fit again.")
        n_spots = np.asarray(found.arrays["trust_spots"], dtype=np.int64)
        xy = np.split(found.xy / np.repeat(found.pitch, n_spots)[:, None], np.cumsum(n_spots)[:-1])
        return cls(
            Calibration.restore(found.arrays),
            NoveltyDetector.restore(found.arrays),
            xy,
            [str(n) for n in found.sections],
        )


def _in_blocks(
    sections: Sequence[Section],
    again: Callable[[Sequence[Section]], Model],
    least: int,
    random_state: int,
    *,
    with_features: bool,
) -> HeldOutPredictions | None:
    """Spots predicted by another fit, which had not seen the whole block around them."""
    parts = _windows(sections, random_state)
    hidden = [_block(part, random_state) for part in parts]
    training = [part.keep(np.flatnonzero(~mask)) for part, mask in zip(parts, hidden, strict=True)]
    if min(map(len, training)) < 2 or sum(map(len, training)) < least or not any(mask.any() for mask in hidden):
        return None
    model = again(training)
    familiar = (
        NoveltyDetector.fit([features_of(each) for each in training], random_state=random_state)
        if with_features
        else None
    )
    missed = []
    for i, (part, mask, seen) in enumerate(zip(parts, hidden, training, strict=True)):
        if not mask.any():
            continue
        points = part.keep(np.flatnonzero(mask))
        looked = Covariates(grids.nearest(points.xy, seen.xy)[0][:, 0], _unlike(familiar, points, i))
        missed.append(HeldOutPredictions(expression_of(points), model.predict(points), looked))
    return HeldOutPredictions.join(missed)


def _windows(sections: Sequence[Section], random_state: int) -> list[Section]:
    """Choose sections, and of each the spots around a random one: whole neighborhoods, at a bounded cost."""
    random = np.random.default_rng(random_state)
    chosen = sorted(random.permutation(len(sections))[:MOST_SECTIONS])
    parts = []
    for section in (sections[i] for i in chosen):
        distance = ((section.xy - section.xy[random.integers(len(section))]) ** 2).sum(axis=1)
        parts.append(section.keep(np.sort(np.argsort(distance, kind="stable")[: MOST_SPOTS // len(chosen)])))
    return parts


def _block(section: Section, random_state: int) -> NDArray[np.bool_]:
    """Spots (n,) to hold back, none where a block would be all of a section."""
    if (np.ptp(section.xy, axis=0) < BLOCK).all():
        return np.zeros(len(section), dtype=bool)
    return grids.hold_out(section.xy, SHARE, block=BLOCK, random_state=random_state)


def _unlike(familiar: NoveltyDetector | None, points: Section, at: int, *, seen: bool = False) -> Floats:
    if familiar is None:
        return np.ones(len(points))
    return familiar(features_of(points), at, seen=seen, statistics=points.feature_statistics)


def _enough(predicted: Means, most: int, random_state: int) -> NDArray[np.intp]:
    """Rows that were held back, no more of them than it takes."""
    rows = np.flatnonzero(np.isfinite(predicted).all(axis=1))
    return np.sort(np.random.default_rng(random_state).permutation(rows)[:most])
