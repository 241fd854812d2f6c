r"""Attention over measured spots: a point reads expression from the spots around it, by position and image features.

HisToSGE's attention (arXiv 2407.20518) does not use the expression measured next to the point that it predicts. Here it
is used. Expression, less its section's gene means, is reduced to a few factors z; a point i with reduced features f and
position p (in spot pitches) reads each factor from the inducing points j, measured spots, through kernels of two kinds,

    z(i) = sum_h sum_j a_h(i, j) u_hj + level of the section
    a_h(i, j) = M(|p_i - p_j| / l_h)  of positions, among spots of one section (M: Matern 3/2); 0.7 of that among
                sections of one tissue, which are registered to each other first (models/_registration.py)
    a_h(i, j) = exp(-|f_i - f_j|^2 / 2 r_h^2)  of image features, among all sections

The values u are not the measured z themselves but solved from them, so that neighbors that carry the same information
do not count twice (kriging: Rasmussen and Williams 2006, eq. 2.25), and far from all spots the prediction returns to
the gene means. A softmax with learned metrics in their place was tried and is less accurate on every section
(benchmarks/LABBOOK.md): a few hundred noisy spots do not carry thousands of weights.

- Loadings are shrunk towards zero as far as their standard errors require, with a prior estimated from all genes
  (adaptive shrinkage: Stephens 2017; models/_factors.py): most of a gene's loading on a factor is noise of a few
  hundred spots.
- Spots are weighted by their measurement precision: spot j has noise variance v_j, estimated by a first smoothing, so a
  spot with few molecules counts less, in the factors and as context.
- No hyperparameter is set to a single best value: kernels are averaged over a small grid of (l, r, feature weight,
  noise e), for each factor separately, by marginal likelihood to the power 0.3 (Gruenwald and van Ommen 2017);
  models/_kernels.py has the algebra.
- Image features are standardized column by column, or on one common scale where the marginal likelihood prefers it:
  columns that are principal components carry information in their variances.
- Up to ``n_inducing`` spots of a section all are inducing points and the solution is exact; beyond, a random choice of
  them carries the map (Quinonero-Candela and Rasmussen 2005, section 4) and the cost is linear in the spots.
- Each section has a solution of its own, from all of its spots and ``n_borrowed_spots`` of similar sections, so that
  cost and memory are linear in the sections, too. Similarity is estimated by evidence (models/_similarity.py): a
  dissimilar section gets a weight near zero, in prediction and in the choice of kernels. One more solution, from a few
  spots of every section, predicts sections that were only stained. Factors and loadings are each section's own, too,
  from the same spots, weighted by similarity; only the metric of the features is shared by all.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto._messages import progress_bar
from sthisto._statistics import leading_components
from sthisto.models._factors import TINY, Factors, normalized_variance, spot_variance
from sthisto.models._kernels import KernelAverage, KernelValues, Spots
from sthisto.models._kriging import UNFITTED, Kriging, Solution
from sthisto.models._model import Count, HeldOut, Natural, Section, Share, State
from sthisto.models._registration import RigidTransforms, register_sections
from sthisto.models._similarity import candidates, centrality, gene_mean_correlation, section_similarity
from sthisto.models._standardize import SectionStandardizer

N_REGISTERED = 8  # factors that sections are registered by
DISSIMILAR = 0.1  # similarity to all others below which a section is reported
NEGLIGIBLE = 0.05  # similarity below which no spots are borrowed
SAMPLE = 500  # spots by which the scale of the features is chosen
MOST_HELD_OUT = 5000  # spots of a section that are predicted without themselves: calibration needs no more
BLOCK = 2048  # of these at once
FEATURES_ONLY = (1.0,)  # feature weights where positions are unknown

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
logger = logging.getLogger("sthisto")


@dataclass(kw_only=True)
class Attention(Kriging):
    """Attention over measured spots, by position and image features.

    Parameters
    ----------
    n_factors
        Factors of expression; ``None`` takes 15, or 30 above 1 000 training spots.
    n_components
        Leading components of the image features that are compared.
    n_inducing
        Inducing points of a section.
    n_borrowed_spots
        Spots of similar sections that a section is fitted with.
    coherence
        Correlation of the expression of two registered sections at the same position; 0 registers none.
    lengths
        Lengths l of the position kernel, in spot pitches.
    feature_lengths
        Lengths r of the feature kernel, in units of the median distance of the reduced features.
    feature_weights
        Weights of the feature kernel against the position kernel.
    noises
        Noise variances e, in units of the signal's.
    power
        Exponent of the marginal likelihood by which kernels are averaged.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, features = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=features, expression=features[:, :2] + 3)
    >>> model = Attention()
    >>> held_out = model.fit([spots])
    >>> model.predict(Section(name="a", xy=xy[:4], features=features[:4])).shape
    (4, 2)
    """

    n_inducing: Count = 1000
    n_borrowed_spots: Natural = 1000
    coherence: Share = 0.7

    outlying = 5.0  # beyond it are artifacts: folds, ink, dust

    state_names = (
        *Kriging.state_names,
        *(f"transform_{name}" for name in RigidTransforms.__dataclass_fields__),
        *("similarity", "starts"),
    )

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        standardizer = SectionStandardizer.of(sections, with_features=True)
        pool = SpotPool(sections, standardizer, np.random.default_rng(random_state))
        variance = normalized_variance(pool.variance())
        z = pool.leading_factors(variance)
        correlation = gene_mean_correlation(standardizer.gene_mean)
        transforms = self._register(sections, pool.section, z, correlation)
        z /= np.sqrt((z**2).mean(axis=0)) + TINY
        xy = np.concatenate([transforms.apply(section.xy, index) for index, section in enumerate(sections)])
        frame, ones, sample = transforms.frame[pool.section], np.ones(len(z)), pool.draw(None, SAMPLE)

        def evidence(features: Floats, lengths: Floats) -> float:
            spots = Spots(xy[sample], features[sample], pool.section[sample], frame[sample], ones[sample])
            return self._average(lengths).evidence(spots, z[sample], variance[sample])

        of_lengths = pool.draw(None, self.n_inducing)
        standardizer, components, features, lengths = self._reduce(sections, standardizer, of_lengths, evidence)
        spots, average = (
            Spots(xy, features, pool.section, frame, ones),
            self._average(lengths),
        )
        compared = candidates(transforms.frame, correlation)
        similarity = section_similarity(spots, z, variance, compared, average, draw=pool.draw)
        _warn_of_dissimilar(similarity, standardizer.names)
        # Only the means that are put back are shrunk: an offset between sections would pass for a factor.
        shrunk = standardizer.shrunk(sections)
        solver = _Solver(self, average, spots, variance, pool, similarity)
        solutions, held_out = solver.solve(shrunk.gene_mean, progress=progress)
        return {
            **shrunk.state(),
            **{f"transform_{name}": array for name, array in vars(transforms).items()},
            **_joined(solutions),
            "components": components,
            "lengths": average.lengths,
            "feature_lengths": lengths,
            "similarity": similarity,
        }, held_out

    def _solution(self, state: State, section: int) -> Solution:
        start, end = state["starts"][section - 1 if section < 0 else section :][:2]
        part = slice(start, end)
        inducing = Spots(*(state[f"inducing_{name}"][part] for name in Spots.__dataclass_fields__))
        values = KernelValues(state["position_values"][:, part], state["feature_values"][:, part])
        return inducing, values, state["level"][section], state["loadings"][section]

    def _placed(self, points: Section, state: State, section: int) -> tuple[Floats, int]:
        if section < 0:
            return points.xy, section
        transforms = RigidTransforms(*(state[f"transform_{name}"] for name in RigidTransforms.__dataclass_fields__))
        return transforms.apply(points.xy, section), transforms.frame[section]

    def _register(
        self, sections: Sequence[Section], section: NDArray[np.int64], z: Floats, correlation: Floats
    ) -> RigidTransforms:
        """Find the transforms of the sections, each to a frame of its own without coherence."""
        if self.coherence <= 0:
            return RigidTransforms.identity(len(sections))
        pitch = np.array([np.nan if each.pitch_um is None else each.pitch_um for each in sections])
        return register_sections(np.concatenate([each.xy for each in sections]), z, section, correlation, pitch)


@dataclass(frozen=True)
class TrainingSet:
    """Spots (n) that a section is fitted with, its own among them."""

    rows: Rows  # in the pool
    spots: Spots
    inducing: Rows  # (j,) of these spots
    variance: Floats  # (n,)
    factors: Factors

    def solve(self, average: KernelAverage, held_out: Rows, step: Any) -> tuple[KernelValues, Floats]:
        """Values of the inducing points and leave-one-out factors; see :meth:`KernelAverage.solve`."""
        z = self.factors.z
        return average.solve(self.spots, self.inducing, z, self.variance, held_out=held_out, step=step)

    def solution(self, values: KernelValues, level: Floats) -> Solution:
        """Put together what to predict with."""
        return self.spots[self.inducing], values, level, self.factors.shrinkage * self.factors.loadings


@dataclass(frozen=True)
class _Solver:
    """Solutions of all sections, and one more for sections that were not fitted."""

    model: Attention
    average: KernelAverage
    spots: Spots
    variance: Floats
    pool: "SpotPool"
    similarity: Floats  # (s, s)

    def solve(self, gene_mean: Floats, *, progress: bool) -> tuple[list[Solution], HeldOut]:
        """Solutions, the one for sections that were not fitted last, and held-out predictions."""
        features_only = replace(self.average, feature_weights=FEATURES_ONLY)
        total = len(gene_mean) * len(self.average.grid) + len(features_only.grid)
        solutions, predictions = [], []
        with progress_bar(total=total, desc="attention", unit="kernel", shown=progress) as bar:
            for section, mean in enumerate(gene_mean):
                training = self._gather(section)
                held_out = self._held_out(section, training)
                own = training.spots.section == section
                values, left_out = training.solve(self.average, held_out, bar.update)
                if 2 * own.sum() < len(own):
                    by_features = training.solve(features_only, held_out, bool)
                    values, left_out = _weighted((values, left_out), by_features, training.factors, held_out)
                solutions.append(training.solution(values, values.level(own[training.inducing])))
                predictions.append(self._predictions(section, training, held_out, left_out, mean))
            training = self._gather(UNFITTED)
            values, _ = training.solve(features_only, np.empty(0, dtype=np.intp), bar.update)
            level = self.average.unfitted_level(training.spots, training.spots[training.inducing], values)
            return [*solutions, training.solution(values, level)], predictions

    def _gather(self, section: int) -> TrainingSet:
        """Spots that a section is fitted with, with factors of its own."""
        rows, inducing, similarity = self._donor_rows(section)
        n_factors = self.model._number_of_factors(len(rows), self.pool.n_genes)
        factors = Factors.of(lambda at: self.pool.deviation(rows[at]), self.variance[rows], similarity, n_factors)
        spots = replace(self.spots[rows], similarity=similarity)
        return TrainingSet(rows, spots, inducing, self.variance[rows], factors)

    def _donor_rows(self, section: int) -> tuple[Rows, Rows, Floats]:
        """Rows of the pool to fit a section with, which of them are inducing points, similarity (n,) of each."""
        pool, n_inducing = self.pool, self.model.n_inducing
        if section == UNFITTED:
            central = centrality(self.similarity)
            donors = np.flatnonzero(central >= NEGLIGIBLE)
            rows, inducing = pool.balanced(donors, 2 * n_inducing), pool.balanced(donors, n_inducing)
            return rows, np.searchsorted(rows, inducing), central[pool.section[rows]]
        similarity = self.similarity[section]
        donors = np.flatnonzero((similarity >= NEGLIGIBLE) & (np.arange(len(similarity)) != section))
        own, borrowed = pool.draw(section), pool.balanced(donors, self.model.n_borrowed_spots)
        n_borrowed = min(len(borrowed), max(n_inducing // 4, n_inducing - len(own)))
        rows = np.sort(np.concatenate([own, borrowed]))
        inducing = np.concatenate([pool.draw(section, n_inducing - n_borrowed), pool.balanced(donors, n_borrowed)])
        return rows, np.searchsorted(rows, np.sort(inducing)), similarity[pool.section[rows]]

    def _held_out(self, section: int, training: TrainingSet) -> Rows:
        """Rows of the training set to predict without themselves."""
        return np.searchsorted(training.rows, self.pool.draw(section, MOST_HELD_OUT))

    def _predictions(
        self, section: int, training: TrainingSet, held_out: Rows, left_out: Floats, gene_mean: Floats
    ) -> NDArray[np.float32]:
        """Held-out predictions (n, g) of a section's spots."""
        own = self.pool.draw(section)
        predictions = np.full((len(own), len(gene_mean)), np.nan, dtype=np.float32)
        for start in range(0, len(held_out), BLOCK):
            rows = held_out[start : start + BLOCK]
            y, z = self.pool.deviation(training.rows[rows]), left_out[start : start + BLOCK]
            expression = training.factors.leave_one_out(y, z, 1 / len(own), rows)
            predictions[np.searchsorted(own, training.rows[rows])] = expression + gene_mean
        return predictions


def _weighted(
    both: tuple[KernelValues, Floats], by_features: tuple[KernelValues, Floats], factors: Factors, own: Rows
) -> tuple[KernelValues, Floats]:
    """Mix two solutions, values and held-out factors, as fits a section's few own spots best.

    Where other sections outnumber it, they determine how much positions count, which the section has hardly any of. The
    weight of the solution that uses positions is a regression of its own spots on both solutions' held-out factors.
    """
    weight = factors.weight[own] * (factors.loadings**2).sum(axis=1)
    difference, error = both[1] - by_features[1], factors.z[own] - by_features[1]
    share = float(np.clip((weight * difference * error).sum() / ((weight * difference**2).sum() + TINY), 0, 1))
    return both[0].mixed(by_features[0], share), share * both[1] + (1 - share) * by_features[1]


def _joined(solutions: Sequence[Solution]) -> State:
    """Arrays of all solutions, inducing points one after another from ``starts`` on."""
    inducing, values, level, loadings = zip(*solutions, strict=True)
    names = Spots.__dataclass_fields__
    return {
        **{f"inducing_{name}": np.concatenate([getattr(each, name) for each in inducing]) for name in names},
        "starts": np.cumsum([0, *map(len, inducing)]),
        "position_values": np.concatenate([each.position for each in values], axis=1),
        "feature_values": np.concatenate([each.features for each in values], axis=1),
        "level": np.array(level),
        "loadings": np.array(loadings),
    }


class SpotPool:
    """Spots of all sections, in one random order: the first few of it are a random sample of any size."""

    def __init__(
        self, sections: Sequence[Section], standardizer: SectionStandardizer, rng: np.random.Generator
    ) -> None:
        self.sections, self.standardizer = sections, standardizer
        self.n_genes = standardizer.gene_mean.shape[1]
        self.section = np.repeat(np.arange(len(sections)), standardizer.n_spots)
        self.order = rng.permutation(len(self.section))
        self.by_section = [self.order[self.section[self.order] == each] for each in range(len(sections))]

    def deviation(self, rows: Rows) -> Floats:
        """Expression (n, g) of ascending rows, less the gene means of their sections."""
        starts = np.cumsum([0, *self.standardizer.n_spots])
        cuts = np.searchsorted(rows, starts)
        parts = zip(self.sections, starts, cuts, cuts[1:], strict=False)
        return np.concatenate(
            [self.standardizer.deviation(each, rows[a:b] - start) for each, start, a, b in parts if a < b]
        )

    def variance(self) -> Floats:
        """Mean square (n,) of every spot about its neighbors in the section."""
        deviation = self.standardizer.deviation
        parts = [spot_variance(each.xy, lambda rows, each=each: deviation(each, rows)) for each in self.sections]  # type: ignore[misc]
        return np.concatenate(parts)

    def leading_factors(self, variance: Floats) -> Floats:
        """Scores (n, f) of all spots in the leading factors of all, by which sections are compared."""
        blocks = [np.arange(start, min(start + BLOCK, len(variance))) for start in range(0, len(variance), BLOCK)]
        weighted = (self.deviation(rows) / np.sqrt(variance[rows])[:, None] for rows in blocks)
        components = leading_components(weighted, N_REGISTERED)
        return np.concatenate([self.deviation(rows) @ components for rows in blocks])

    def draw(self, section: int | None, most: int | None = None) -> Rows:
        """Rows of a section, or of all together, ascending."""
        return np.sort((self.order if section is None else self.by_section[section])[:most])

    def balanced(self, sections: Rows, most: int) -> Rows:
        """As many rows as there is room for, of each section as many, as far as it has them."""
        of = [self.by_section[each] for each in sections]
        rank = np.concatenate([np.empty(0, dtype=np.intp), *(np.arange(len(each)) for each in of)])
        rows = np.concatenate([np.empty(0, dtype=np.intp), *of])
        return np.sort(rows[np.argsort(rank, kind="stable")[:most]])


def _warn_of_dissimilar(similarity: Floats, names: Sequence[str]) -> None:
    """Report sections that are dissimilar to all that they were compared with."""
    for index, name in enumerate(names):
        others = np.delete(similarity[index], index)
        if len(others) and np.nanmax(others) < DISSIMILAR:
            logger.warning(
                "section %r is dissimilar to all others (similarity %.2f) and is modeled on its own",
                name,
                np.nanmax(others),
            )
