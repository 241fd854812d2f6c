"""Novelty of image features: how far they are from those of the training spots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from sthisto._statistics import FeatureStatistics, leading_components

COMPONENTS = 20
N_NEIGHBORS = 5
MAX_SPOTS = 2000  # kept to compare with; the cost of a dense map is this times its points
TYPICAL = 0.99  # share of the training spots that are not novel
CHUNK = 1024

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoveltyDetector:
    """Novelty scores of image features by their distance to the nearest training spots.

    Features are standardized with their section's statistics, as in the models, and projected on the leading principal
    components of the training spots; the score is the mean distance to the nearest few of these, in units of its median
    over training spots, each compared with the others. Unlike a distance to the mean, it also detects gaps between
    types of tissue. A point is novel if its score exceeds those of 99 in 100 training spots (a conformal p-value below
    .01; Laxhammar and Falkman 2010, doi:10.1145/1833280.1833287).

    Attributes
    ----------
    mean, scale
        (s, d) mean and inverse standard deviation of each section's features.
    axes
        (d, q) principal axes.
    components
        (k, q) projected features of training spots.
    median_distance
        Median distance of training spots to the others.
    limit
        Score above which a point is novel.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> detector = NoveltyDetector.fit([rng.normal(size=(200, 3)).astype(np.float32)], random_state=0)
    >>> novelty = detector(np.array([[0, 0, 0], [30, 0, 0]], dtype=np.float32), section=0)
    >>> detector.is_novel(novelty).tolist()
    [False, True]
    """

    mean: Floats
    scale: Floats
    axes: Floats
    components: Floats
    median_distance: float
    limit: float

    @classmethod
    def fit(cls, features: Sequence[NDArray[np.float32]], *, random_state: int) -> "NoveltyDetector":
        """Fit to the features (n, d) of the training spots, one array a section."""
        statistics, random = [FeatureStatistics.of(part) for part in features], np.random.default_rng(random_state)
        most = -(-MAX_SPOTS // len(features))
        standard = np.concatenate(
            [
                of_section.standardize(part[np.sort(random.permutation(len(part))[:most])])
                for part, of_section in zip(features, statistics, strict=True)
            ]
        )
        axes = leading_components([standard], COMPONENTS)
        components = standard @ axes
        distance = _distance(components, components, skip=1)
        median = float(np.median(distance)) or 1.0
        limit = float(np.quantile(distance, TYPICAL, method="higher")) / median
        means, scales = (np.array([getattr(each, name) for each in statistics]) for name in ("mean", "inverse_std"))
        return cls(means, scales, axes, components, median, limit)

    def __call__(
        self,
        features: NDArray[np.float32],
        section: int,
        *,
        training: bool = False,
        statistics: FeatureStatistics | None = None,
    ) -> Floats:
        """Novelty scores (m,), 1 where tissue is typical.

        Parameters
        ----------
        features
            (m, d).
        section
            Index of the fitted section that the points belong to; -1 for a section that was not fitted.
        training
            The points are training spots and are not compared with themselves.
        statistics
            Statistics of a section that was not fitted, from its own spots; ``None`` takes those of ``features``.
        """
        if section >= 0:
            statistics = FeatureStatistics(self.mean[section], self.scale[section])
        elif statistics is None:
            statistics = FeatureStatistics.of(features)
        distance = np.empty(len(features))
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            projected = statistics.standardize(features[rows]) @ self.axes
            distance[rows] = _distance(projected, self.components, skip=int(training))
        return distance / self.median_distance

    def is_novel(self, novelty: Floats) -> NDArray[np.bool_]:
        """Mask (m,) of the scores above the limit."""
        return novelty > self.limit

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All attributes as named numeric arrays."""
        return {f"novelty_{name}": np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "NoveltyDetector | None":
        """Undo :meth:`state`; ``None`` where the model reads no features."""
        if "novelty_components" not in state:
            return None
        values = [np.asarray(state[f"novelty_{name}"], dtype=np.float64) for name in cls.__dataclass_fields__]
        mean, scale, axes, components, median, limit = values
        return cls(mean, scale, axes, components, float(median), float(limit))


def _distance(points: Floats, training: Floats, skip: int) -> Floats:
    """Mean distance (m,) to the nearest training spots, without the first ``skip``."""
    last = min(skip + N_NEIGHBORS, len(training)) - 1
    near = np.sort(np.partition(cdist(points, training), last, axis=1)[:, : last + 1], axis=1)[:, skip:]
    mean: Floats = near.mean(axis=1)
    return mean
