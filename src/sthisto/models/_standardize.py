"""What is particular to one section: taken off before sections are pooled, put back in the end.

Stains differ and so does sequencing depth, so features are standardised and gene means taken per section, over its
training spots. What is left is what sections share.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto.models._model import Section
from sthisto.uncertainty import FeatureStatistics

CHUNK = 2048


@dataclass(frozen=True)
class SectionStandardizer:
    """Feature statistics and gene means of the fitted sections, one row a section."""

    names: list[str]
    n_spots: NDArray[np.int64]  # (s,)
    gene_mean: NDArray[np.float64]  # (s, g)
    feature_mean: NDArray[np.float64]  # (s, d), d = 0 where the model reads no features
    feature_scale: NDArray[np.float64]  # (s, d), 1 / standard deviation; 0 where a feature is constant

    @classmethod
    def of(cls, sections: Sequence[Section], *, with_features: bool) -> "SectionStandardizer":
        """Take the statistics of sections with expression.

        Raises
        ------
        ValueError
            Two sections of one name, or a section without expression or without features that are needed.
        """
        nothing = FeatureStatistics(np.empty(0), np.empty(0))
        statistics = [FeatureStatistics.of(features_of(each)) if with_features else nothing for each in sections]
        return cls(
            names_of(sections),
            np.array([len(section) for section in sections]),
            np.array([expression_of(section).mean(axis=0, dtype=np.float64) for section in sections]),
            np.array([each.mean for each in statistics]),
            np.array([each.inverse_std for each in statistics]),
        )

    def shrunk(self, sections: Sequence[Section]) -> "SectionStandardizer":
        """Gene means drawn towards those of the other sections, as far as their own few spots leave them open.

        With t the variance of true means about each other, in units of that within sections, a section's own mean has
        the weight t / (t + 1 / n) (Efron and Morris 1973). Genes share t, but for those that clearly differ by more.
        """
        if len(sections) == 1:
            return self
        within = self._within(sections)
        apart = (self.gene_mean - self.n_spots @ self.gene_mean / self.n_spots.sum()) ** 2 / within
        each = (apart - 1 / self.n_spots[:, None]).mean(axis=0) * len(sections) / (len(sections) - 1)
        t = np.maximum(each, max(0.0, float(each.mean())))
        own = t / (t + 1 / self.n_spots[:, None])
        total = self.n_spots @ self.gene_mean - self.n_spots[:, None] * self.gene_mean
        others = total / (self.n_spots.sum() - self.n_spots)[:, None]
        return replace(self, gene_mean=own * self.gene_mean + (1 - own) * others)

    def _within(self, sections: Sequence[Section]) -> NDArray[np.float64]:
        """Variance (g,) of the genes within sections; infinite where they do not vary."""
        square = sum((self.deviation(section) ** 2).sum(axis=0) for section in sections)
        variance = np.asarray(square) / self.n_spots.sum()
        return np.where(variance > 0, variance, np.inf)

    def index(self, name: str) -> int:
        """Row of the section, -1 for one that was not fitted."""
        return self.names.index(name) if name in self.names else -1

    def mean_of(self, name: str) -> NDArray[np.float64]:
        """Gene means (g,) of a section; of one that was not fitted, the mean over all training spots."""
        if name in self.names:
            own: NDArray[np.float64] = self.gene_mean[self.index(name)]
            return own
        pooled: NDArray[np.float64] = self.n_spots @ self.gene_mean / self.n_spots.sum()
        return pooled

    def statistics_of(self, points: Section) -> FeatureStatistics:
        """Feature statistics of the fitted section, or those that a section that was not fitted brings."""
        features = features_of(points)
        if features.shape[1] != self.feature_mean.shape[1]:
            raise ValueError(
                f"the model was fitted on {self.feature_mean.shape[1]} features and section {points.name!r} has "
                f"{features.shape[1]}: extract them with the same encoder and settings."
            )
        at = self.index(points.name)
        if at >= 0:
            return FeatureStatistics(self.feature_mean[at], self.feature_scale[at])
        return points.feature_statistics or FeatureStatistics.of(features)

    def standardised(self, points: Section) -> NDArray[np.float64]:
        """Features (m, d), standardized with :meth:`statistics_of`."""
        return self.statistics_of(points).standardize(features_of(points))

    def chunks(self, points: Section) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Rows and their standardized features, a few at a time: a dense map in float64 would not fit in memory."""
        statistics = self.statistics_of(points)
        for start in range(0, len(points), CHUNK):
            rows = slice(start, start + CHUNK)
            yield rows, statistics.standardize(features_of(points)[rows])

    def deviation(self, section: Section, rows: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.float64]:
        """Expression (n, g) of one section, or of some of its spots, less its gene means."""
        return expression_of(section)[rows] - self.mean_of(section.name)

    def deviations(self, sections: Sequence[Section]) -> NDArray[np.float64]:
        """Expression of the sections, each less its gene means, pooled (n, g)."""
        return np.concatenate([self.deviation(section) for section in sections])

    def leverage(self) -> NDArray[np.float64]:
        """Share (n, 1) of a spot in the mean of its section, for spots pooled as in :meth:`deviations`."""
        return np.repeat(1 / self.n_spots, self.n_spots)[:, None]

    def expression(self, deviations: NDArray[np.float64]) -> list[NDArray[np.float32]]:
        """Undo :meth:`deviations`: pooled rows (n, g) to expression, one array a section."""
        parts = np.split(deviations, np.cumsum(self.n_spots)[:-1])
        return [(part + mean).astype(np.float32) for part, mean in zip(parts, self.gene_mean, strict=True)]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        return {
            "section_names": pack_names(self.names),
            "section_spots": self.n_spots,
            "gene_mean": self.gene_mean,
            "feature_mean": self.feature_mean,
            "feature_scale": self.feature_scale,
        }

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[Any]]) -> "SectionStandardizer":
        """Undo :meth:`state`; other entries are left alone."""
        return cls(
            unpack_names(state["section_names"]),
            *(state[key] for key in ("section_spots", "gene_mean", "feature_mean", "feature_scale")),
        )


def names_of(sections: Sequence[Section]) -> list[str]:
    """List the sections' names, which must differ."""
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise ValueError(f"sections are told apart by their names, which must differ: {names}")
    return names


def pack_names(names: list[str]) -> NDArray[np.uint8]:
    """Write names as the bytes of a JSON list: a model's state holds numeric arrays only."""
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def unpack_names(packed: NDArray[np.generic]) -> list[str]:
    """Undo :func:`pack_names`."""
    names: list[str] = json.loads(packed.tobytes())
    return names


def features_of(section: Section) -> NDArray[np.float32]:
    """Give the features, or an error that says they are missing."""
    if section.features is None:
        raise ValueError(f"section {section.name!r} has no image features; extract them first (pp.extract_features)")
    return section.features


def expression_of(section: Section) -> NDArray[np.float32]:
    """Give the measured expression, or an error that says it is missing."""
    if section.expression is None:
        raise ValueError(f"section {section.name!r} has no measured expression to learn from")
    return section.expression
