r"""Attention over measured spots: a point takes the expression of the spots around it, by place and by look.

HisToSGE's attention (arXiv 2407.20518) never sees the expression measured next to the point that it predicts. Here it
does. Expression, less its section's gene means, is reduced to a few factors z; a point i with reduced features f and
position p (in spot pitches) reads each factor from the anchors j, measured spots, through heads h of two kinds,

    z(i) = sum_h sum_j a_h(i, j) u_hj + level of the section
    a_h(i, j) = M(|p_i - p_j| / l_h)  by place, among spots of the same section (M: Matern 3/2); 0.7 of that among
                sections of one tissue, which are laid over each other first (models/_registration.py)
    a_h(i, j) = exp(-|f_i - f_j|^2 / 2 r_h^2)  by look, among all sections

The values u are not the measured z themselves but solved from them, so that neighbors who say the same do not count
twice (kriging: Rasmussen and Williams 2006, eq. 2.25), and far from everything the prediction goes back to the gene
means. A softmax with learned metrics in their place was tried and is behind on every section (benchmarks/LABBOOK.md): a
few hundred noisy spots do not carry thousands of weights.

- Loadings are drawn to zero as far as their errors say, by what all genes tell of each factor (adaptive shrinkage:
  Stephens 2017; models/_factors.py): most of what a gene has against a factor is noise of a few hundred spots.
- Spots speak as loudly as they were measured: spot j has noise variance v_j, from a first smoothing, so a spot with few
  molecules counts less, in the factors and as context.
- Nothing is set by a single best choice: heads are mixed over a small grid of (l, r, share of look, noise e), each
  factor its own way, by evidence to the power 0.3 (Gruenwald and van Ommen 2017); models/_kernels.py has the algebra.
- Up to ``n_anchors`` spots of a section all are anchors and the solution is exact; beyond, a random choice of them
  carries the map (Quinonero-Candela and Rasmussen 2005, section 4) and the cost is linear in the spots.
- Each section has a solution of its own, from all of its spots and ``n_beside`` of the sections that it is kin to, so
  that cost and memory are linear in the sections, too. Kinship is found by evidence (models/_similarity.py): a
  stranger is
  hardly listened to, nor does it have a say in which heads the others take. One more solution, from a few spots of
  every section, tells sections that were only stained. Factors and loadings are each section's own, too, from the same
  spots, weighted by kinship; only the metric of looks is shared by all.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from tqdm.auto import tqdm

from sthisto.models._factors import TINY, Factors, leading, relative, spot_variance
from sthisto.models._kernels import Heads, KernelAverage, Spots, Values
from sthisto.models._model import Section
from sthisto.models._registration import RigidTransforms, register_sections
from sthisto.models._similarity import likeness, relatives, similarity, standing
from sthisto.models._standardize import SectionStandardizer

OUTLYING = 5.0  # features beyond so many deviations are artefacts: folds, ink, dust
LEADING = 8  # factors that sections are laid over each other by
STRANGER = 0.1  # kinship below which a section is said not to fit another
HEARD = 0.05  # kinship below which it is not worth the time to listen
ALL = (1.0,)  # share of look, for sections that have no place
UNFITTED = -1  # number of a section that was not fitted

Floats = NDArray[np.float64]
logger = logging.getLogger("sthisto")


@dataclass(kw_only=True)
class Attention:
    """Attention over measured spots, by place and by look.

    ``coherence`` is how much the expression of two sections of one tissue agrees at the same place; 0 lays none over
    another. A section listens to ``n_beside`` spots of others. ``n_factors=None`` takes 15, or 30 above 1 000 training
    spots; ``n_components`` of the features are compared. ``lengths`` l are in units of the spot pitch,
    ``feature_lengths`` r in units of the median distance of the reduced features, ``looks`` are the shares of look,
    ``noises`` in units of the signal; ``power`` tempers the evidence.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, look = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=look, expression=look[:, :2] + 3)
    >>> model = Attention()
    >>> held_back = model.fit([spots], random_state=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=xy[:4], features=look[:4])).shape
    (4, 2)
    """

    n_factors: int | None = None
    n_components: int = 20
    n_anchors: int = 1000
    n_beside: int = 1000
    coherence: float = 0.7
    lengths: Sequence[float] = (1.0, 3.0, 9.0)
    feature_lengths: Sequence[float] = (0.7, 1.4)
    looks: Sequence[float] = (0.3, 0.7)
    noises: Sequence[float] = tuple(np.geomspace(0.03, 100, 11).tolist())
    power: float = 0.3
    history: dict[str, Floats] = field(default_factory=dict, init=False, repr=False)

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn from all sections; return the leave-one-out predictions, (n, g) a section.

        Raises
        ------
        ValueError
            Two sections of one name, or one without features or expression.
        """
        centring = SectionStandardizer.of(sections, with_features=True)
        standard = [centring.standardised(section).clip(-OUTLYING, OUTLYING) for section in sections]
        axes = leading(standard, self.n_components)  # (d, q)
        look = np.concatenate([part @ axes for part in standard])
        variance = relative(np.concatenate([spot_variance(each.xy, centring.deviation(each)) for each in sections]))
        pool = _Pool(sections, centring, np.random.default_rng(random_state))
        shared = self._shared(pool, variance)
        alike = likeness(centring.gene_mean)
        frames = self._lay_over(sections, pool.section, shared, alike)
        placed = np.concatenate([frames.place(section.xy, each) for each, section in enumerate(sections)])
        spots = Spots(placed, look, pool.section, frames.frame[pool.section], np.ones(len(look)))
        self._state: dict[str, NDArray[Any]] = {
            # Only what is put back is shrunk: an offset between sections would pass for a factor and hide how they lie.
            **centring.shrunk(sections).state(),
            **{f"frames_{name}": value for name, value in vars(frames).items()},
            "axes": axes,
            "lengths": np.array(self.lengths),
            "feature_lengths": np.array(self.feature_lengths)
            * (np.median(pdist(look[pool.draw(None, self.n_anchors)])) or 1.0),
        }
        z = shared / (np.sqrt((shared**2).mean(axis=0)) + TINY)
        compared = relatives(frames.frame, alike)
        self._state["kinship"] = similarity(spots, z, variance, compared, self._mixtures(), draw=pool.draw)
        _report(self._state["kinship"], centring.names)
        return self._solve(spots, variance, pool, progress=progress)

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points; of a section that was not fitted, from the look alone.

        Raises
        ------
        ValueError
            No features, or another number of them than in ``fit``.
        """
        state, centring = self._state, SectionStandardizer.restore(self._state)
        frames = RigidTransforms(*(state[f"frames_{name}"] for name in RigidTransforms.__dataclass_fields__))
        base, section = centring.mean_of(points.name), centring.index(points.name)
        placed = frames.place(points.xy, section) if section >= 0 else points.xy
        frame = frames.frame[section] if section >= 0 else UNFITTED
        part = slice(*state["starts"][[section, section + 1]]) if section >= 0 else slice(state["starts"][-2], None)
        anchors = Spots(*(state[f"anchor_{name}"][part] for name in Spots.__dataclass_fields__))
        by_place, by_look = state["by_place"][:, part], state["by_look"][:, part]
        heads = self._mixtures().heads
        predicted = np.empty((len(points), len(base)), dtype=np.float32)
        for rows, features in centring.chunks(points):
            look = features.clip(-OUTLYING, OUTLYING) @ state["axes"]
            here, lies = np.full(len(look), section), np.full(len(look), frame)
            place, alike = heads(Spots(placed[rows], look, here, lies, np.ones(len(look))), anchors)
            z = (place @ by_place).sum(axis=0) + (alike @ by_look).sum(axis=0) + state["level"][section]
            predicted[rows] = base + z @ state["loadings"][section]
        return predicted

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Each section's anchors, their reduced features and their values in every head and factor."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave.

        Raises
        ------
        ValueError
            It is of an earlier version, where all sections had the same loadings.
        """
        if state["loadings"].ndim != 3:
            raise ValueError("the attention model was fitted by an earlier sthisto, with other loadings. Fit again.")
        self._state = dict(state)

    def _mixtures(self) -> KernelAverage:
        state = self._state
        heads = Heads(state["lengths"], state["feature_lengths"], self.coherence)
        return KernelAverage(heads, self.looks, np.array(self.noises), self.power)

    def _shared(self, pool: "_Pool", variance: Floats) -> Floats:
        """Scores (n, f) of all spots in the leading factors of all, by which sections are compared."""
        rows = [pool.draw(each) for each in range(len(pool.sections))]
        axes = leading((pool.deviation(each) / np.sqrt(variance[each])[:, None] for each in rows), LEADING)
        return np.concatenate([pool.deviation(each) @ axes for each in rows])

    def _n_factors(self, spots: Spots, y: Floats) -> int:
        return min(self.n_factors or (30 if len(spots) > 1000 else 15), int(y.shape[1]))

    def _lay_over(
        self, sections: Sequence[Section], of: NDArray[np.int64], z: Floats, alike: Floats
    ) -> RigidTransforms:
        """RigidTransforms of the sections, each its own without coherence."""
        if self.coherence <= 0:
            return RigidTransforms.apart(len(sections))
        pitch = np.array([np.nan if section.pitch_um is None else section.pitch_um for section in sections])
        return register_sections(np.concatenate([section.xy for section in sections]), z, of, alike, pitch)

    def _solve(self, spots: Spots, variance: Floats, pool: "_Pool", *, progress: bool) -> list[NDArray[np.float32]]:
        """Solve for each section, then for those that were not fitted; return what was held back, (n, g) a section."""
        mixtures, looks = self._mixtures(), replace(self._mixtures(), looks=ALL)
        n_sections = len(self._state["kinship"])
        total = n_sections * mixtures.n + looks.n
        solved, held_back = [], []
        with tqdm(total=total, desc="attention", unit="mixture", disable=not progress) as bar:
            for one in range(n_sections):
                heard = self._listen(one, spots, variance, pool)
                values, left_out = mixtures.solve(*heard.asked, step=bar.update)
                own = heard.spots.section == one
                if 2 * own.sum() < len(own):
                    values, left_out = _by_own_spots((values, left_out), looks.solve(*heard.asked), heard.factors, own)
                solved.append(heard.solution(values, values.level(own[heard.chosen])))
                forgotten = heard.factors.forget(heard.y, left_out, np.array(1 / own.sum()))[own]
                held_back.append((forgotten + self._state["gene_mean"][one]).astype(np.float32))
            heard = self._listen(UNFITTED, spots, variance, pool)
            values, _ = looks.solve(*heard.asked, step=bar.update)
            solved.append(heard.solution(values, self._unseen(heard.spots, heard.chosen, values)))
        self._state |= _Solution.join(solved)
        return held_back

    def _listen(self, one: int, spots: Spots, variance: Floats, pool: "_Pool") -> "_Heard":
        """Gather what a section is told from, factors of its own included."""
        rows, chosen, similarity = self._company(one, pool, self._state["kinship"])
        y = pool.deviation(rows)
        factors = Factors.of(y, variance[rows], similarity, self._n_factors(spots, y))
        return _Heard(replace(spots[rows], similarity=similarity), chosen, y, variance[rows], factors)

    def _unseen(self, spots: Spots, chosen: NDArray[np.intp], values: Values) -> Floats:
        """Level (f,) of a section that was not fitted: with it the spots, told by their look, have their gene means."""
        _, alike = self._mixtures().heads(replace(spots, section=np.full(len(spots), UNFITTED)), spots[chosen])
        level: Floats = -(alike @ values.by_look).sum(axis=0).mean(axis=0)
        return level

    def _company(self, one: int, pool: "_Pool", kin: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
        """Rows that a section listens to, which of them are anchors, and the kinship (n,) of each."""
        if one == UNFITTED:
            heard = standing(kin)
            among = np.flatnonzero(heard >= HEARD)
            rows, chosen = pool.fair(among, 2 * self.n_anchors), pool.fair(among, self.n_anchors)
            return rows, np.searchsorted(rows, chosen), heard[pool.section[rows]]
        others = np.flatnonzero((kin[one] >= HEARD) & (np.arange(len(kin)) != one))
        own, beside = pool.draw(one), pool.fair(others, self.n_beside)
        guests = min(len(beside), max(self.n_anchors // 4, self.n_anchors - len(own)))
        rows = np.sort(np.concatenate([own, beside]))
        chosen = np.concatenate([pool.draw(one, self.n_anchors - guests), pool.fair(others, guests)])
        return rows, np.searchsorted(rows, np.sort(chosen)), kin[one][pool.section[rows]]


@dataclass(frozen=True)
class _Heard:
    """Spots (n) that a section listens to, its own among them."""

    spots: Spots
    chosen: NDArray[np.intp]  # (j,) rows that are anchors
    y: Floats  # (n, g)
    variance: Floats  # (n,)
    factors: Factors

    @property
    def asked(self) -> tuple[Spots, NDArray[np.intp], Floats, Floats]:
        """What a mixture is solved from."""
        return self.spots, self.chosen, self.factors.z, self.variance

    def solution(self, values: Values, level: Floats) -> "_Solution":
        """Put together what to predict with."""
        return _Solution(self.spots[self.chosen], values, level, self.factors.share * self.factors.loadings)


def _by_own_spots(
    both: tuple[Values, Floats], from_looks: tuple[Values, Floats], factors: Factors, own: NDArray[np.bool_]
) -> tuple[Values, Floats]:
    """Mix two solutions, values and held-back factors, as the few own spots of a section have it.

    Where other sections outnumber it, they settle how much place has to say, on places of which it has hardly any.
    Which share of that to believe is a regression of the own spots on what both solutions say of them without them.
    """
    weight = factors.weight[own] * (factors.loadings**2).sum(axis=1)
    differ, missed = both[1][own] - from_looks[1][own], factors.z[own] - from_looks[1][own]
    share = float(np.clip((weight * differ * missed).sum() / ((weight * differ**2).sum() + TINY), 0, 1))
    return both[0].mixed(from_looks[0], share), share * both[1] + (1 - share) * from_looks[1]


@dataclass(frozen=True)
class _Solution:
    """What one section is told from: anchors (j), their values, the section's level (f,) and the loadings (f, g)."""

    anchors: Spots
    values: Values
    level: Floats
    loadings: Floats

    @staticmethod
    def join(solved: Sequence["_Solution"]) -> dict[str, NDArray[Any]]:
        """Arrays of all, anchors one after another from ``starts`` on."""
        anchors = [vars(each.anchors) for each in solved]
        return {
            **{f"anchor_{name}": np.concatenate([each[name] for each in anchors]) for name in anchors[0]},
            "starts": np.cumsum([0, *(len(each.anchors) for each in solved)]),
            "by_place": np.concatenate([each.values.by_place for each in solved], axis=1),
            "by_look": np.concatenate([each.values.by_look for each in solved], axis=1),
            "level": np.array([each.level for each in solved]),
            "loadings": np.array([each.loadings for each in solved]),
        }


class _Pool:
    """Spots of all sections, in one order by chance: the first few of it are a fair choice of any size."""

    def __init__(self, sections: Sequence[Section], centring: SectionStandardizer, rng: np.random.Generator) -> None:
        self.sections, self.centring = sections, centring
        self.section = np.repeat(np.arange(len(sections)), centring.n_spots)
        self.order = rng.permutation(len(self.section))
        self.by_section = [self.order[self.section[self.order] == each] for each in range(len(sections))]

    def deviation(self, rows: NDArray[np.intp]) -> Floats:
        """Expression (n, g) of rows in rising order, less the gene means of their sections."""
        starts = np.cumsum([0, *self.centring.n_spots])
        cuts = np.searchsorted(rows, starts)
        parts = zip(self.sections, starts, cuts, cuts[1:], strict=False)
        return np.concatenate(
            [self.centring.deviation(each, rows[a:b] - start) for each, start, a, b in parts if a < b]
        )

    def draw(self, section: int | None, most: int | None = None) -> NDArray[np.intp]:
        """Rows of a section, or of all together, in rising order."""
        return np.sort((self.order if section is None else self.by_section[section])[:most])

    def fair(self, sections: NDArray[np.intp], most: int) -> NDArray[np.intp]:
        """As many rows as there is room for, of each section as many, as far as it has them."""
        of = [self.by_section[each] for each in sections]
        turn = np.concatenate([np.empty(0, dtype=np.intp), *(np.arange(len(each)) for each in of)])
        rows = np.concatenate([np.empty(0, dtype=np.intp), *of])
        return np.sort(rows[np.argsort(turn, kind="stable")[:most]])


def _report(kin: Floats, names: Sequence[str]) -> None:
    """Say which sections fit none of those that they were compared with."""
    for one, name in enumerate(names):
        beside = np.delete(kin[one], one)
        if len(beside) and np.nanmax(beside) < STRANGER:
            logger.warning("section %r fits none of the others (kinship %.2f): left apart", name, np.nanmax(beside))
