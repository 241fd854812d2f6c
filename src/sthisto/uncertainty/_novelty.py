"""How unlike any training spot a piece of tissue looks.

Features are standardised with their section's statistics, as models see them, and reduced to the leading principal
components of the training spots; what counts is the mean distance to the nearest few of these. Unlike a distance to the
mean it notices gaps between kinds of tissue, too. Training spots are looked up without themselves, which gives the
yardstick: 1 is the usual distance, and a point further off than 99 of 100 training spots is called unusual (a
conformal p-value below .01; Laxhammar and Falkman 2010, doi:10.1145/1833280.1833287).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from sthisto._statistics import FeatureStatistics, leading_components

COMPONENTS = 20
NEIGHBOURS = 5
MOST_SPOTS = 2000  # looked up among; the cost of a dense map is this times its points
USUAL = 0.99  # share of the training spots that are not unusual
CHUNK = 1024

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoveltyDetector:
    """The looks of the training spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> known = NoveltyDetector.fit([rng.normal(size=(200, 3)).astype(np.float32)], random_state=0)
    >>> unlike = known(np.array([[0, 0, 0], [30, 0, 0]], dtype=np.float32), section=0)
    >>> known.unusual(unlike).tolist()
    [False, True]
    """

    mean: Floats  # (s, d) of each section's features
    scale: Floats  # (s, d) 1 / deviation; 0 where a feature is constant
    axes: Floats  # (d, q)
    looks: Floats  # (k, q) reduced features of training spots
    usual: float  # median distance of training spots to the others
    limit: float  # in units of that: what lies further is unusual

    @classmethod
    def fit(cls, features: Sequence[NDArray[np.float32]], *, random_state: int) -> "NoveltyDetector":
        """Take up the features (n, d) of the training spots, section by section."""
        statistics, random = [FeatureStatistics.of(part) for part in features], np.random.default_rng(random_state)
        most = -(-MOST_SPOTS // len(features))
        parts = []
        for part, of_section in zip(features, statistics, strict=True):
            parts.append(of_section.standardize(part[np.sort(random.permutation(len(part))[:most])]))
        standard = np.concatenate(parts)
        axes = leading_components([standard], COMPONENTS)
        looks = standard @ axes
        distance = _distance(looks, looks, skip=1)
        usual = float(np.median(distance)) or 1.0
        limit = float(np.quantile(distance, USUAL, method="higher")) / usual
        means, scales = (np.array([getattr(each, name) for each in statistics]) for name in ("mean", "inverse_std"))
        return cls(means, scales, axes, looks, usual, limit)

    def __call__(
        self,
        features: NDArray[np.float32],
        section: int,
        *,
        seen: bool = False,
        statistics: FeatureStatistics | None = None,
    ) -> Floats:
        """Give how unlike (m,) points look, 1 as usual.

        Parameters
        ----------
        features
            (m, d).
        section
            Index of the fitted section that the points belong to; -1 for a section that was not fitted.
        seen
            They are training spots, to be looked up without themselves.
        statistics
            Statistics of a section that was not fitted, from its own spots; ``None`` takes those of ``features``.
        """
        if section >= 0:
            statistics = FeatureStatistics(self.mean[section], self.scale[section])
        elif statistics is None:
            statistics = FeatureStatistics.of(features)
        unlike = np.empty(len(features))
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            unlike[rows] = _distance(statistics.standardize(features[rows]) @ self.axes, self.looks, skip=int(seen))
        return unlike / self.usual

    def unusual(self, unlike: Floats) -> NDArray[np.bool_]:
        """Tell which points (m,) look less like the training spots than 99 of 100 of these like the others."""
        return unlike > self.limit

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        return {f"familiar_{name}": np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "NoveltyDetector | None":
        """Undo :meth:`state`; ``None`` where the model read no features."""
        if "familiar_looks" not in state:
            return None
        found = {name: np.asarray(state[f"familiar_{name}"], dtype=np.float64) for name in cls.__dataclass_fields__}
        numbers = float(found["usual"]), float(found["limit"])
        return cls(found["mean"], found["scale"], found["axes"], found["looks"], *numbers)


def _distance(looks: Floats, known: Floats, skip: int) -> Floats:
    """Mean distance (m,) to the nearest of the known looks, without the first ``skip``."""
    last = min(skip + NEIGHBOURS, len(known)) - 1
    near = np.sort(np.partition(cdist(looks, known), last, axis=1)[:, : last + 1], axis=1)[:, skip:]
    mean: Floats = near.mean(axis=1)
    return mean
