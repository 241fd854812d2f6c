"""What models have in common that predict expression factors by kriging: the kernels, the features they compare."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from sthisto._statistics import leading_components
from sthisto.models._kernels import KernelAverage, KernelValues, Spots
from sthisto.models._model import Count, Model, Positive, Section, Share, State
from sthisto.models._standardize import STATE, SectionStandardizer

MANY_SPOTS = 1000  # training spots above which there are more factors
UNFITTED = -1  # index of a section that was not fitted

Floats = NDArray[np.float64]
Solution = tuple[Spots, KernelValues, Floats, Floats]  # inducing points (j), their values, level (f,), loadings (f, g)


@dataclass(kw_only=True)
class Kriging(Model):
    """Expression factors of spots, predicted from inducing points."""

    n_factors: Count | None = None
    n_components: Count = 20
    lengths: Sequence[Positive] = (1.0, 3.0, 9.0)
    feature_lengths: Sequence[Positive] = (0.7, 1.4)
    feature_weights: Sequence[Share] = (0.3, 0.7)
    noises: Sequence[Positive] = tuple(np.geomspace(0.03, 100, 11).tolist())
    power: Positive = 0.3

    state_names = (
        *(*STATE, "components", "lengths", "feature_lengths", "position_values", "feature_values", "level", "loadings"),
        *(f"inducing_{name}" for name in Spots.__dataclass_fields__),
    )

    outlying: ClassVar[float] = np.inf  # standard deviations to which features are clipped

    @abstractmethod
    def _solution(self, state: State, section: int) -> Solution:
        """Give what the points of a section, -1 for one that was not fitted, are predicted from."""

    def _placed(self, points: Section, state: State, section: int) -> tuple[Floats, int]:
        """Positions (m, 2) of the points, and their coordinate frame."""
        return points.xy, section

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        standardizer = SectionStandardizer.restore(state)
        mean, section = standardizer.mean_of(points.name), standardizer.index(points.name)
        inducing, values, level, loadings = self._solution(state, section)
        (xy, frame), average = self._placed(points, state, section), self._average(state["feature_lengths"])
        predicted = np.empty((len(points), len(mean)), dtype=np.float32)
        for rows, features in standardizer.chunks(points, limit=self.outlying):
            n = len(features)
            reduced = features @ state["components"]
            spots = Spots(xy[rows], reduced, np.full(n, section), np.full(n, frame), np.ones(n))
            predicted[rows] = mean + (average.predict(spots, inducing, values) + level) @ loadings
        return predicted

    def _average(self, feature_lengths: Floats) -> KernelAverage:
        """Kernels with these feature lengths, in units of the reduced features."""
        return KernelAverage(
            lengths=np.asarray(self.lengths, dtype=float),
            feature_lengths=feature_lengths,
            feature_weights=self.feature_weights,
            noises=np.asarray(self.noises, dtype=float),
            power=self.power,
            coherence=getattr(self, "coherence", 0.0),
        )

    def _number_of_factors(self, n_spots: int, n_genes: int) -> int:
        return min(self.n_factors or (30 if n_spots > MANY_SPOTS else 15), n_genes)

    def _reduce(
        self,
        sections: Sequence[Section],
        standardizer: SectionStandardizer,
        sample: NDArray[np.intp],
        evidence: Callable[[Floats, Floats], float],
    ) -> tuple[SectionStandardizer, Floats, Floats, Floats]:
        """Standardizer, components (d, q), reduced features (n, q) and feature lengths, on the scale that fits best.

        ``evidence`` gives the log marginal likelihood of the sampled spots' reduced features and feature lengths.
        Columns that are principal components carry information in their variances, others in different units do not.
        """
        fits = []
        for common in (False, True):
            scaled = replace(standardizer, common_scale=common)
            components = leading_components(scaled.all_chunks(sections, self.outlying), self.n_components)
            reduced = np.concatenate([part @ components for part in scaled.all_chunks(sections, self.outlying)])
            lengths = np.asarray(self.feature_lengths, dtype=float) * (np.median(pdist(reduced[sample])) or 1.0)
            fits.append((evidence(reduced, lengths), scaled, components, reduced, lengths))
        return max(fits, key=lambda fit: fit[0])[1:]
