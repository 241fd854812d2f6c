"""Predictive uncertainty of a fit: calibrated on held-out spots during ``fit``, stored with the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sthisto import _crossfit, _data, grids
from sthisto._crossfit import Refit
from sthisto.models import Section
from sthisto.models._standardize import expression_of, features_of
from sthisto.uncertainty import Calibration, Covariates, HeldOutPredictions, NoveltyDetector

BLOCK = 4.0  # pitches: side of the held-out blocks
FRACTION = 0.3  # of the spots, held out in blocks
MAX_SECTIONS, MAX_SPOTS = 4, 1000  # of the fit without the blocks, from which four numbers are estimated
ENOUGH_SPOTS = 5000  # for the distribution about the predictions

Floats = NDArray[np.float64]
Means = NDArray[np.float32]


@dataclass(frozen=True)
class UncertaintyModel:
    """Calibration of a fit, and its training spots.

    Attributes
    ----------
    calibration
        Distribution of new measurements.
    detector
        Novelty of image features; ``None`` where the model reads none.
    xy, names
        Training spots (n, 2) of each section in pitches, and the sections' names.
    """

    calibration: Calibration
    detector: NoveltyDetector | None
    xy: list[Floats]
    names: list[str]

    @classmethod
    def fit(
        cls,
        sections: Sequence[Section],
        held_out: Sequence[Means],
        *,
        with_features: bool,
        refit: Refit | None,
        min_spots: int,
        random_state: int,
    ) -> "UncertaintyModel":
        """Fit to held-out predictions.

        Parameters
        ----------
        sections
            Training spots with expression.
        held_out
            (n, g) of each section, the model's leave-one-out predictions.
        with_features
            The model reads features.
        refit
            Fits another such model on a part of the sections; ``None`` where that would take too long.
        min_spots
            Training spots that it needs.
        random_state
            Seed of the spots that are held out in blocks.
        """
        detector = _detector(sections, random_state) if with_features else None
        parts = []
        for i, (section, predicted) in enumerate(zip(sections, held_out, strict=True)):
            rows = _enough(predicted, -(-ENOUGH_SPOTS // len(sections)), random_state)
            novelty = _novelty(detector, section.keep(rows), i, training=True)
            covariates = Covariates(grids.nearest(section.xy[rows], section.xy, k=2)[0][:, 1], novelty)
            parts.append(HeldOutPredictions(expression_of(section)[rows], predicted[rows], covariates))
        blocks = refit and _hold_out_blocks(sections, refit, min_spots, random_state, with_features=with_features)
        calibration = Calibration.fit(HeldOutPredictions.join(parts), blocks)
        return cls(calibration, detector, [each.xy for each in sections], [each.name for each in sections])

    def covariates(self, points: Section) -> Covariates:
        """Distance of points (m,) to the training spots, and their novelty."""
        at = self.names.index(points.name) if points.name in self.names else -1
        distance = grids.nearest(points.xy, self.xy[at])[0][:, 0] if at >= 0 else np.full(len(points), np.inf)
        return Covariates(distance, _novelty(self.detector, points, at))

    def extrapolated(self, covariates: Covariates) -> NDArray[np.bool_]:
        """Mask (m,) of points outside the training domain, in position or in image features.

        In position: further from measured spots than any held-out spot was. A section without measured spots has no
        such distance, and only image features count.
        """
        limit = self.calibration.inflation.max_tested_distance * (1 + 1e-6)
        away = np.isfinite(covariates.distance) & (covariates.distance > limit)
        return away if self.detector is None else away | self.detector.is_novel(covariates.novelty)

    def layers(self, mean: Means, covariates: Covariates, interval: float | None) -> dict[str, Means]:
        """Standard deviation (m, g) of a new measurement, and on request the bounds of an interval."""
        layers = {"std": self.calibration.std(mean, covariates)}
        if interval is not None:
            layers["low"], layers["high"] = self.calibration.interval(mean, covariates, interval)
        return layers

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All parts as named numeric arrays, except positions and names, which the fit record has."""
        own = {} if self.detector is None else self.detector.state()
        return {**self.calibration.state(), **own, "calibration_spots": np.array([len(xy) for xy in self.xy])}

    @classmethod
    def restore(cls, fit: _data.Fit) -> "UncertaintyModel":
        """Undo :meth:`state`, from the record of a fit."""
        if "calibration_spots" not in fit.arrays:
            raise ValueError("the model was fitted by an earlier sthisto, without calibrated uncertainty. Fit again.")
        n_spots = np.asarray(fit.arrays["calibration_spots"], dtype=np.int64)
        xy = np.split(fit.xy / np.repeat(fit.pitch, n_spots)[:, None], np.cumsum(n_spots)[:-1])
        names = [str(name) for name in fit.sections]
        return cls(Calibration.restore(fit.arrays), NoveltyDetector.restore(fit.arrays), xy, names)


def _hold_out_blocks(
    sections: Sequence[Section], refit: Refit, min_spots: int, random_state: int, *, with_features: bool
) -> HeldOutPredictions | None:
    """Predictions of spots by a fit without the whole block around them; None where too few spots would be left."""
    parts = _windows(sections, random_state)
    masks = [_crossfit.hold_out_blocks(part, FRACTION, BLOCK, random_state) for part in parts]
    training = _crossfit.training_spots(parts, masks)
    if min(map(len, training)) < 2 or sum(map(len, training)) < min_spots or not any(mask.any() for mask in masks):
        return None
    detector = _detector(training, random_state) if with_features else None
    points = _crossfit.points_of(parts, masks)
    predicted = _crossfit.predict(refit(training), points)
    held_out = []
    for i, (part, mask) in enumerate(zip(parts, masks, strict=True)):
        if mask.any():
            distance = grids.nearest(points[i].xy, training[i].xy)[0][:, 0]
            covariates = Covariates(distance, _novelty(detector, points[i], i))
            held_out.append(HeldOutPredictions(expression_of(part)[mask], predicted[i], covariates))
    return HeldOutPredictions.join(held_out)


def _windows(sections: Sequence[Section], random_state: int) -> list[Section]:
    """Choose sections, and of each the spots around a random one: whole neighborhoods, at a bounded cost."""
    random = np.random.default_rng(random_state)
    chosen = sorted(random.permutation(len(sections))[:MAX_SECTIONS])
    parts = []
    for section in (sections[i] for i in chosen):
        distance = ((section.xy - section.xy[random.integers(len(section))]) ** 2).sum(axis=1)
        parts.append(section.keep(np.sort(np.argsort(distance, kind="stable")[: MAX_SPOTS // len(chosen)])))
    return parts


def _detector(sections: Sequence[Section], random_state: int) -> NoveltyDetector:
    return NoveltyDetector.fit([features_of(each) for each in sections], random_state=random_state)


def _novelty(detector: NoveltyDetector | None, points: Section, at: int, *, training: bool = False) -> Floats:
    if detector is None:
        return np.ones(len(points))
    return detector(features_of(points), at, training=training, statistics=points.feature_statistics)


def _enough(predicted: Means, most: int, random_state: int) -> NDArray[np.intp]:
    """Rows with held-out predictions, no more of them than are needed."""
    rows = np.flatnonzero(np.isfinite(predicted).all(axis=1))
    return np.sort(np.random.default_rng(random_state).permutation(rows)[:most])
