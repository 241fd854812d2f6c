"""Standardization of sections: feature statistics and gene means of each, over its training spots.

Stains differ and so does sequencing depth. What is left after standardization is what sections share.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto._statistics import FeatureStatistics
from sthisto.models._model import Section

CHUNK = 2048

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SectionStandardizer:
    """Feature statistics and gene means of the fitted sections, one row a section."""

    names: list[str]
    n_spots: NDArray[np.int64]  # (s,)
    gene_mean: Floats  # (s, g)
    feature_mean: Floats  # (s, d), d = 0 where the model reads no features
    feature_scale: Floats  # (s, d), 1 / standard deviation; 0 where a feature is constant
    common_scale: bool = False  # features keep their variances relative to each other

    @classmethod
    def of(cls, sections: Sequence[Section], *, with_features: bool) -> "SectionStandardizer":
        """Take the statistics of sections with expression."""
        nothing = FeatureStatistics(np.empty(0), np.empty(0))
        statistics = [FeatureStatistics.of(features_of(each)) if with_features else nothing for each in sections]
        return cls(
            [section.name for section in sections],
            np.array([len(section) for section in sections]),
            np.array([expression_of(section).mean(axis=0, dtype=np.float64) for section in sections]),
            np.array([each.mean for each in statistics]),
            np.array([each.inverse_std for each in statistics]),
        )

    def shrunk(self, sections: Sequence[Section]) -> "SectionStandardizer":
        """Gene means shrunk towards those of the other sections, as far as their own few spots leave them open.

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

    def _within(self, sections: Sequence[Section]) -> Floats:
        """Variance (g,) of the genes within sections; infinite where they do not vary."""
        square = sum(
            (self.deviation(section, slice(start, start + CHUNK)) ** 2).sum(axis=0)
            for section in sections
            for start in range(0, len(section), CHUNK)
        )
        variance = np.asarray(square) / self.n_spots.sum()
        return np.where(variance > 0, variance, np.inf)

    def index(self, name: str) -> int:
        """Row of the section, -1 for one that was not fitted."""
        return self.names.index(name) if name in self.names else -1

    def mean_of(self, name: str) -> Floats:
        """Gene means (g,) of a section; of one that was not fitted, the mean over all training spots."""
        at = self.index(name)
        mean: Floats = self.gene_mean[at] if at >= 0 else self.n_spots @ self.gene_mean / self.n_spots.sum()
        return mean

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

    def chunks(self, points: Section, *, limit: float = np.inf) -> Iterator[tuple[slice, Floats]]:
        """Rows and their standardized features, a few at a time, clipped to ``limit`` standard deviations."""
        statistics = self.statistics_of(points)
        scale: Floats | float = statistics.relative_std() if self.common_scale else 1.0
        for start in range(0, len(points), CHUNK):
            rows = slice(start, start + CHUNK)
            yield rows, statistics.standardize(features_of(points)[rows]).clip(-limit, limit) * scale

    def all_chunks(self, sections: Sequence[Section], limit: float) -> Iterator[Floats]:
        """Standardized features of all sections, a few rows at a time."""
        return (part for section in sections for _, part in self.chunks(section, limit=limit))

    def standardized(self, points: Section) -> Floats:
        """Standardized features (m, d)."""
        return np.concatenate([part for _, part in self.chunks(points)])

    def deviation(self, section: Section, rows: NDArray[np.intp] | slice = slice(None)) -> Floats:
        """Expression (n, g) of one section, or of some of its spots, less its gene means."""
        return expression_of(section)[rows] - self.mean_of(section.name)

    def deviations(self, sections: Sequence[Section]) -> Floats:
        """Expression of the sections, each less its gene means, pooled (n, g)."""
        return np.concatenate([self.deviation(section) for section in sections])

    def leverage(self) -> Floats:
        """Share (n, 1) of a spot in the mean of its section, for spots pooled as in :meth:`deviations`."""
        return np.repeat(1 / self.n_spots, self.n_spots)[:, None]

    def expression(self, deviations: Floats) -> list[NDArray[np.float32]]:
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
            "common_scale": np.array([self.common_scale], dtype=np.uint8),
        }

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[Any]]) -> "SectionStandardizer":
        """Undo :meth:`state`; other entries are ignored."""
        n_spots, gene_mean, feature_mean, feature_scale, common_scale = (state[name] for name in STATE[1:])
        names = unpack_names(state["section_names"])
        return cls(names, n_spots, gene_mean, feature_mean, feature_scale, bool(common_scale[0]))


STATE = ("section_names", "section_spots", "gene_mean", "feature_mean", "feature_scale", "common_scale")


def pack_names(names: list[str]) -> NDArray[np.uint8]:
    """Write names as the bytes of a JSON list: a model's state holds numeric arrays only."""
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def unpack_names(packed: NDArray[np.generic]) -> list[str]:
    """Undo :func:`pack_names`."""
    names: list[str] = json.loads(packed.tobytes())
    return names


def features_of(section: Section) -> NDArray[np.float32]:
    """Give the features, or raise an error if they are missing."""
    if section.features is None:
        raise ValueError(f"section {section.name!r} has no image features; extract them first (pp.extract_features)")
    return section.features


def expression_of(section: Section) -> NDArray[np.float32]:
    """Give the measured expression, or raise an error if it is missing."""
    if section.expression is None:
        raise ValueError(f"section {section.name!r} has no measured expression to learn from")
    return section.expression
