"""Inverse-distance weighting: the weighted average of the nearest spots (Shepard 1968).

    y(p) = sum_j w_j y_j / sum_j w_j,    w_j = |p - p_j|^-power,    j over the nearest measured spots

It reads no image and fits nothing: the reference that every other model has to beat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import KDTree

from sthisto.models._model import Count, HeldOut, Model, NonNegative, Section, State
from sthisto.models._standardize import expression_of, pack_names, unpack_names


@dataclass(kw_only=True)
class Idw(Model):
    """Average of the nearest spots of the section, weighted by distance.

    A point on a spot takes that spot's value, so the map passes through the measurements, noise included.

    Parameters
    ----------
    n_neighbors
        Spots that are averaged.
    power
        Weights are the distances to the minus ``power``.

    Examples
    --------
    >>> spots = Section(name="a", xy=np.array([[0.0, 0], [3, 0]]), expression=np.array([[1], [6]], dtype=np.float32))
    >>> model = Idw()
    >>> held_out = model.fit([spots])
    >>> model.predict(Section(name="a", xy=np.array([[1.0, 0], [3, 0]])))
    array([[2.],
           [6.]], dtype=float32)
    """

    n_neighbors: Count = 16
    power: NonNegative = 2.0

    state_names = ("section_names", "section", "xy", "expression")

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        state: State = {
            "section_names": pack_names([section.name for section in sections]),
            "section": np.repeat(np.arange(len(sections)), [len(section) for section in sections]),
            "xy": np.concatenate([section.xy for section in sections]),
            "expression": np.concatenate([expression_of(section) for section in sections]).astype(np.float32),
        }
        return state, [self._average(section, state, exclude_self=True) for section in sections]

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        return self._average(points, state, exclude_self=False)

    def _average(self, points: Section, state: State, *, exclude_self: bool) -> NDArray[np.float32]:
        names = unpack_names(state["section_names"])
        if points.name not in names:
            raise ValueError(
                f"idw averages measured spots of the same section and has none of {points.name!r} (fitted: {names}); "
                "use a model that reads the image, such as ridge or gp."
            )
        own: NDArray[np.bool_] = state["section"] == names.index(points.name)
        xy, expression = state["xy"][own], state["expression"][own]
        wanted = self.n_neighbors + exclude_self
        distance, spot = KDTree(xy).query(points.xy, k=np.arange(1, min(wanted, len(xy)) + 1))
        if exclude_self:
            # By row, not by distance zero: two spots can share a position, and then one predicts the other.
            distance[spot == np.arange(len(xy))[:, None]] = np.inf
        weights = _weights(distance, self.power)
        table = sparse.csr_array(
            (weights.ravel(), spot.ravel(), np.arange(0, spot.size + 1, spot.shape[1])), shape=(len(spot), len(xy))
        )
        averages: NDArray[np.float32] = table @ expression
        return averages


def _weights(distance: NDArray[np.float64], power: float) -> NDArray[np.float32]:
    """Weights (m, k) that sum to one a row; distance inf counts nothing, and a row of nothing else becomes NaN."""
    nearest = distance.min(axis=1, keepdims=True)
    on_spot = nearest == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        # Relative to the nearest, so that no power of a distance can overflow.
        weights = np.where(on_spot, distance == 0, (distance / nearest) ** -power)
        normalized: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalized
