"""Inverse-distance weighting: the average of the nearest spots, near ones counting more (Shepard 1968).

    y(p) = sum_j w_j y_j / sum_j w_j,    w_j = |p - p_j|^-power,    j over the nearest measured spots

It reads no image and learns nothing, so a model that does not beat it has learnt nothing either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import KDTree

from sthisto.models._model import Section
from sthisto.models._standardize import expression_of, names_of, pack_names, unpack_names


@dataclass(kw_only=True)
class Idw:
    """Average of the ``n_neighbors`` nearest spots of the section, weighted by distance to the minus ``power``.

    A point on a spot takes that spot's value, so the map runs through the measurements, noise included.

    Examples
    --------
    >>> spots = Section(name="a", xy=np.array([[0.0, 0], [3, 0]]), expression=np.array([[1], [6]], dtype=np.float32))
    >>> model = Idw()
    >>> held_back = model.fit([spots], random_state=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=np.array([[1.0, 0], [3, 0]])))
    array([[2.],
           [6.]], dtype=float32)
    """

    n_neighbors: int = 16
    power: float = 2.0
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Keep the spots; return each spot's average of the others, (n, g) a section.

        Raises
        ------
        ValueError
            Two sections of one name, or one without expression.
        """
        self._state: dict[str, NDArray[Any]] = {
            "section_names": pack_names(names_of(sections)),
            "section": np.repeat(np.arange(len(sections)), [len(section) for section in sections]),
            "xy": np.concatenate([section.xy for section in sections]),
            "expression": np.concatenate([expression_of(section) for section in sections]).astype(np.float32),
        }
        return [self._average(section, exclude_self=True) for section in sections]

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points.

        Raises
        ------
        ValueError
            The section of the points was not fitted.
        """
        return self._average(points, exclude_self=False)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Spots and their expression."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""
        self._state = dict(state)

    def _average(self, points: Section, *, exclude_self: bool) -> NDArray[np.float32]:
        names = unpack_names(self._state["section_names"])
        if points.name not in names:
            raise ValueError(
                f"idw averages measured spots of the same section and has none of {points.name!r} (fitted: {names}); "
                "use a model that reads the image, such as ridge or gp."
            )
        own: NDArray[np.bool_] = self._state["section"] == names.index(points.name)
        xy, expression = self._state["xy"][own], self._state["expression"][own]
        wanted = self.n_neighbors + exclude_self
        distance, spot = KDTree(xy).query(points.xy, k=np.arange(1, min(wanted, len(xy)) + 1))
        if exclude_self:
            # By row, not by distance zero: two spots can share a place, and then one speaks for the other.
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
        normalised: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised
