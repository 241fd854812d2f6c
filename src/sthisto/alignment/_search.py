"""Search of the similarity transformation under which the image predicts most: a coarse grid, then a descent."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sthisto.alignment._raster import FeatureRaster
from sthisto.alignment._statistic import HeldOutRidge
from sthisto.alignment._transform import SYMMETRIES, Similarity

MAX_ROTATION = 15.0  # degrees
MAX_SCALE = 0.1
MAX_SHIFT = 3.0  # pitches
SLACK = 1.4  # of the descent, in the limits of rotation and scale
STEP = 0.4  # of the patch: the statistic changes over this length
N_STARTS = 8
FIRST_STEP, LAST_STEP = 0.5, 0.06  # of the descent, in steps of the coarse grid
MAX_ITERATIONS = 40
CHUNK = 64  # candidates scored at once
_SYMMETRIES = np.stack(list(SYMMETRIES.values()))
_NAMES = tuple(SYMMETRIES)

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Search:
    """Candidate transformations of a section's spots, and the held-out loss under them.

    A candidate is a row of five numbers: the symmetry, then, all in pitches so that steps compare, the arc of the
    rotation and the growth at the root mean square distance of the spots from their center, and the place of the
    center.

    Attributes
    ----------
    raster
        Kernel components of the image.
    ridge
        Regression of the expression factors.
    xy
        (n, 2) pixels.
    pitch
        Pixels between neighboring spots.
    center, radius
        Center (2,) of the section's spots in pixels, and root mean square distance from it in pitches.
    step
        Distance of coarse candidates, pitches.
    """

    raster: FeatureRaster
    ridge: HeldOutRidge
    xy: Floats
    pitch: float
    center: Floats
    radius: float
    step: float

    @classmethod
    def of(cls, raster: FeatureRaster, ridge: HeldOutRidge, xy: Floats, pitch: float) -> "Search":
        """Search over spots ``xy`` (n, 2), pixels."""
        center = xy.mean(axis=0)
        radius = float(np.sqrt(((xy - center) ** 2).sum(axis=1).mean())) / pitch
        return cls(raster, ridge, xy, pitch, center, radius, max(1.0, STEP * raster.extent / pitch))

    def keep(self, rows: NDArray[np.intp]) -> "Search":
        """The same candidates on some of the spots."""
        ridge = HeldOutRidge(self.ridge.factors[..., rows, :], self.ridge.fold[rows])
        return replace(self, ridge=ridge, xy=self.xy[rows])

    @property
    def identity(self) -> Floats:
        """The candidate (1, 5) that leaves the spots where they are."""
        return np.array([[0.0, 0.0, 0.0, *(self.center / self.pitch)]])

    def transformation(self, candidate: Floats) -> Similarity:
        """Transformation of pixels by a candidate (5,)."""
        symmetry, arc, growth, *center = candidate
        return Similarity.of(
            _NAMES[int(symmetry)],
            rotation=float(np.rad2deg(arc / self.radius)),
            scale=float(np.exp(growth / self.radius)),
            shift=np.array(center) * self.pitch - self.center,
            center=self.center,
        )

    def positions(self, candidates: Floats) -> Floats:
        """Spots (k, n, 2) under candidates (k, 5), pixels."""
        angle, scale = candidates[:, 1] / self.radius, np.exp(candidates[:, 2] / self.radius)
        rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = np.moveaxis(rotation, 2, 0) @ _SYMMETRIES[candidates[:, 0].astype(np.intp)]
        moved: Floats = (self.xy - self.center) @ matrix.transpose(0, 2, 1)
        moved += candidates[:, None, 3:] * self.pitch
        return moved

    def losses(self, candidates: Floats, factors: Singles | None = None) -> Singles:
        """Held-out losses (k, q); ``factors`` (k, n, q) are of one candidate each, (n, q) of all."""
        parts = []
        for i in range(0, len(candidates), CHUNK):
            components = self.raster.at(self.positions(candidates[i : i + CHUNK]))
            part = factors[i : i + CHUNK] if factors is not None and factors.ndim == 3 else factors
            parts.append(self.ridge.losses(components, part))
        return np.concatenate(parts)

    def displacement(self, candidates: Floats, start: Floats | None = None) -> Floats:
        """Root mean square distance (k,) of the spots from where they are, or under a candidate (1, 5), pitches."""
        origin = self.xy if start is None else self.positions(start)
        moved = (self.positions(candidates) - origin) / self.pitch
        distance: Floats = np.sqrt((moved**2).sum(axis=2).mean(axis=1))
        return distance

    def coarse(self) -> Floats:
        """Candidates (k, 5) within the limits of the search, for every symmetry and place that it may be about."""
        arcs = _grid(np.deg2rad(MAX_ROTATION) * self.radius, 1.3 * self.step)
        growths = _grid(np.log1p(MAX_SCALE) * self.radius, 1.3 * self.step)
        line = _grid(MAX_SHIFT, self.step)
        shifts = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
        shifts = shifts[(shifts**2).sum(axis=1) <= (MAX_SHIFT + 0.2) ** 2]
        parts = []
        for symmetry in range(len(_SYMMETRIES)):
            for place in self._places(symmetry):
                rows = np.stack(np.meshgrid(arcs, growths, np.arange(len(shifts)), indexing="ij"), -1).reshape(-1, 3)
                moved = place / self.pitch + shifts[rows[:, 2].astype(np.intp)]
                parts.append(np.column_stack([np.full(len(rows), symmetry), rows[:, :2], moved]))
        return np.concatenate(parts)

    def _places(self, symmetry: int) -> list[Floats]:
        """Where the center of the spots may be: where it is; moved with the image; on the tissue if few spots are."""
        matrix, middle = _SYMMETRIES[symmetry], self.raster.size / 2
        before = middle if matrix[0, 0] else middle[::-1]  # an image turned on its side had its sides exchanged
        others = [middle + matrix @ (self.center - before)]
        if self.raster.inside(self.xy).mean() < 0.5:
            others.append(self.raster.tissue_center())
        places = [self.center]
        for other in others:
            if min(np.linalg.norm(other - each) for each in places) > 0.5 * self.step * self.pitch:
                places.append(other)
        return places

    def starts(self, candidates: Floats, loss: Singles, number: int = N_STARTS) -> Floats:
        """The best candidates that are not the same place, more than a coarse step from each other."""
        chosen: list[int] = []
        places: list[Floats] = []
        for i in np.argsort(loss, kind="stable")[:2000]:
            place = self.positions(candidates[i : i + 1])[0] / self.pitch
            if all(np.sqrt(((place - each) ** 2).sum(axis=1).mean()) > 1.2 * self.step for each in places):
                chosen.append(int(i))
                places.append(place)
            if len(chosen) == number:
                break
        return candidates[chosen]

    def descend(
        self, starts: Floats, factors: Singles | None = None, *, last_step: float = LAST_STEP
    ) -> tuple[Floats, Singles]:
        """Move every start (k, 5) to the best of its neighbors until none is better; return also the losses (k,).

        A compass search, all starts at once: the loss is not smooth enough for gradients, and cheap.
        """
        place, step = starts.copy(), np.full(len(starts), FIRST_STEP * self.step)
        best = self.losses(place, factors).sum(axis=1)
        compass = np.concatenate([np.eye(4), -np.eye(4)])
        limit = SLACK * self.radius * np.array([np.deg2rad(MAX_ROTATION), np.log1p(MAX_SCALE)])
        for _ in range(MAX_ITERATIONS):
            active = np.flatnonzero(step > last_step * self.step)
            if not len(active):
                break
            neighbors = np.repeat(place[active], len(compass), axis=0)
            neighbors[:, 1:] += np.tile(compass, (len(active), 1)) * np.repeat(step[active], len(compass))[:, None]
            neighbors[:, 1:3] = neighbors[:, 1:3].clip(-limit, limit)
            own = factors if factors is None or factors.ndim == 2 else np.repeat(factors[active], len(compass), axis=0)
            loss = self.losses(neighbors, own).sum(axis=1).reshape(len(active), -1)
            least = loss.argmin(axis=1)
            lower = loss[np.arange(len(active)), least] < best[active]
            moved = active[lower]
            place[moved] = neighbors.reshape(len(active), -1, 5)[lower, least[lower]]
            best[moved] = loss[lower, least[lower]]
            step[active[~lower]] /= 2
        return place, best


def _grid(limit: float, step: float) -> Floats:
    """Symmetric values from -limit to limit, 0 among them, at most a step apart; 0 alone where the limit is small."""
    half = int(np.ceil(limit / step)) if limit > 0.35 * step else 0
    return np.linspace(-limit, limit, 2 * half + 1) if half else np.zeros(1)
