"""Lattices, distances and splits of spots: plain arrays in, plain arrays out.

Spots of an array lie on a lattice, ``origin + i * a + j * b``, be it hexagonal (Visium), square (Spatial
Transcriptomics, Visium HD) or turned and slightly stretched by the scanner. :class:`Lattice` finds it from the spots
alone and makes it denser; the functions beside it answer which spots are near a point and which are to be held out.
Lengths are in the units of ``xy``: pixels of the full-resolution image throughout the package.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from numbers import Integral
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter
from scipy.spatial import Voronoi, cKDTree

__all__ = ["Lattice", "hold_out", "nearest", "spacing", "within"]

logger = logging.getLogger("sthisto")

FEWEST_SPOTS = 5  # three fit any lattice and a fourth too often
MOST_SHARED = 0.02  # share of the spots that jitter may put on a site that another spot has
ALIKE = 1.15  # lengths that differ by less count as equal when a lattice is named: MOB arrays are stretched by 1.11
BATCH = 1 << 20  # sites looked at together


@dataclass(frozen=True, eq=False)
class Lattice:
    """Points ``origin + i * a + j * b`` for the rows a, b of ``basis``; hexagonal and square arrays alike.

    One description for every array keeps the rest of the package free of cases: a denser grid is the basis divided,
    a spot's place in the array is its pair of indices, and both hold whatever the rotation.

    Parameters
    ----------
    origin
        (2,) pixels, x then y: the site of index (0, 0).
    basis
        (2, 2) pixels: one lattice vector a row.

    Raises
    ------
    ValueError
        Other shapes, values that are not finite, or two vectors along one line.

    Examples
    --------
    >>> lattice = Lattice.hexagonal(100.0)
    >>> lattice.points([[0, 0], [1, 0], [0, 1]]).round(1).tolist()
    [[0.0, 0.0], [100.0, 0.0], [50.0, 86.6]]
    >>> lattice.kind, round(lattice.reach, 1), lattice.refine(2).pitch
    ('hexagonal', 57.7, 50.0)
    """

    origin: NDArray[np.float64]
    basis: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, shape in {"origin": (2,), "basis": (2, 2)}.items():
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(f"{name} should hold finite numbers of shape {shape}; it is {value.tolist()}.")
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        lengths = np.linalg.norm(self.basis, axis=1)
        if _area(self.basis) <= 1e-9 * lengths.prod():
            raise ValueError(f"the rows of basis should span the plane; {self.basis.tolist()} lie along one line.")

    @classmethod
    def fit(cls, xy: ArrayLike) -> Self:
        """Find the lattice that the spots lie on, from their positions alone.

        Tables seldom say how the array lies on the image, and what they say is of another scale as often as not. The
        differences between near spots repeat with the lattice, so their Fourier transform peaks at its reciprocal
        vectors, whatever the rotation and however many sites are empty. The basis found so is then fitted to longer
        and longer differences, from all pieces of tissue at once: no step is so long that the error left by the step
        before could miscount the sites, as happens where a pitch is read off neighbours and carried across the slide.
        At the end origin and basis are fitted to all spots by least squares, both vectors free, so that an array
        which the scanner stretched is followed.

        Parameters
        ----------
        xy
            (n, 2) pixels: at least five spots of one section. Up to 60 % of the sites inside the tissue may be empty
            and spots may stray from their site with a standard deviation of 0.12 of the pitch; the fewer they stray,
            the more may be empty.

        Returns
        -------
        The lattice, with the spots' lowest indices 0. Its vectors are of the shortest, 60 degrees apart in a
        hexagonal and 90 in a square array, with a positive determinant; ``a`` is the one nearest to 10 degrees from
        the x axis towards y, so that arrays which lie straight or turned by 30, 45 or 90 degrees, as most do, are
        far from the angle where the choice flips.

        Raises
        ------
        ValueError
            Fewer than five spots, positions that are not finite or occur twice, spots along one line, or spots that
            are too far from the best lattice, with the figures.

        Examples
        --------
        >>> spots = Lattice.square(200.0, origin=(30.0, 40.0)).points([[0, 0], [1, 0], [2, 0], [0, 1], [2, 1]])
        >>> lattice = Lattice.fit(spots)
        >>> lattice.kind, round(lattice.pitch, 6), lattice.index(spots)[-1].tolist()
        ('square', 200.0, [2, 1])
        """
        spots = _positions(xy)
        if len(spots) < FEWEST_SPOTS:
            raise ValueError(f"a lattice needs at least {FEWEST_SPOTS} spots; there are {len(spots)}.")
        if again := len(spots) - len(_distinct(spots)):
            raise ValueError(
                f"{again} of {len(spots)} spots are where another spot is. A lattice is fitted to one section at a "
                "time: are these several?"
            )
        lattice = cls(*_settle(spots, _basis(*_differences(spots))))
        site = lattice.index(spots)
        _check_fit(spots - lattice.points(site), site, lattice.pitch)
        return cls(lattice.points([site.min(axis=0)])[0], lattice.basis)

    @classmethod
    def square(cls, pitch: float, origin: Sequence[float] = (0.0, 0.0)) -> Self:
        """Square lattice along x and y with ``pitch`` pixels from site to site.

        Raises
        ------
        ValueError
            ``pitch`` is not positive or not finite.

        Examples
        --------
        >>> Lattice.square(2.0).basis.tolist()
        [[2.0, 0.0], [0.0, 2.0]]
        """
        return cls(np.asarray(origin), _length(pitch, "pitch") * np.eye(2))

    @classmethod
    def hexagonal(cls, pitch: float, origin: Sequence[float] = (0.0, 0.0)) -> Self:
        """Hexagonal lattice with rows along x and ``pitch`` pixels from a site to its six neighbours.

        Raises
        ------
        ValueError
            ``pitch`` is not positive or not finite.

        Examples
        --------
        >>> Lattice.hexagonal(2.0).basis.round(3).tolist()
        [[2.0, 0.0], [1.0, 1.732]]
        """
        return cls(np.asarray(origin), _length(pitch, "pitch") * np.array([[1.0, 0.0], [0.5, 0.75**0.5]]))

    @property
    def kind(self) -> Literal["hexagonal", "square", "oblique"]:
        """Hexagonal where the three shortest vectors are alike (15 %), square where two and their diagonals are."""
        a, b = _reduce(self.basis)[0]
        if _alike(a, b, b - a):
            return "hexagonal"
        return "square" if _alike(a, b) and _alike(a + b, b - a) else "oblique"

    @property
    def pitch(self) -> float:
        """Length of the shortest lattice vector, the mean over those that are alike, pixels."""
        a, b = _reduce(self.basis)[0]
        shortest = {"hexagonal": [a, b, b - a], "square": [a, b], "oblique": [a]}[self.kind]
        return float(np.linalg.norm(shortest, axis=1).mean())

    @property
    def reach(self) -> float:
        """Covering radius, pixels: no place of the plane is further from a site (hexagonal pitch/√3, square pitch/√2).

        It is the radius of the circle through the corners of the triangle that the shortest vectors make.
        """
        a, b = _reduce(self.basis)[0]
        return float(np.linalg.norm([a, b, b - a], axis=1).prod() / (2 * _area(self.basis)))

    @property
    def cell(self) -> NDArray[np.float64]:
        """Corners (k, 2), pixels, about a site of what is nearer to it than to any other: a square or a hexagon.

        The cells of all sites fill the plane, so that a map drawn with them has neither gaps nor overlaps.
        """
        steps = np.indices((7, 7)).reshape(2, -1).T - 3
        voronoi = Voronoi(steps @ _reduce(self.basis)[0])
        corners = voronoi.vertices[voronoi.regions[voronoi.point_region[len(steps) // 2]]]
        order = np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))
        return np.asarray(corners[order], dtype=np.float64)

    def index(self, xy: ArrayLike) -> NDArray[np.int64]:
        """Find the indices of the site nearest to each position: (n, 2) pixels -> (n, 2).

        It is the nearest indeed, whatever the basis; rounding the coordinates along a and b would miss it near the
        corners of a hexagon.

        Raises
        ------
        ValueError
            Positions that are not finite.

        Examples
        --------
        >>> Lattice.hexagonal(100.0).index([[52.0, 80.0], [0.0, 0.0]]).tolist()
        [[0, 1], [0, 0]]
        """
        basis, change = _reduce(self.basis)
        return _nearest_site(_positions(xy) - self.origin, basis).astype(np.int64) @ change

    def points(self, index: ArrayLike) -> NDArray[np.float64]:
        """Give the positions of sites: indices (m, 2) -> (m, 2) pixels.

        Examples
        --------
        >>> Lattice.square(2.0, origin=(1.0, 0.0)).points([[3, 1]]).tolist()
        [[7.0, 2.0]]
        """
        return self.origin + _positions(index, "index") @ self.basis

    def refine(self, factor: int) -> Self:
        """Lattice that is ``factor``² times as dense; the old sites stay, with their indices times ``factor``.

        Raises
        ------
        ValueError
            ``factor`` is no whole number of at least 1.

        Examples
        --------
        >>> Lattice.square(2.0).refine(2).points([[1, 0], [2, 0]]).tolist()
        [[1.0, 0.0], [2.0, 0.0]]
        """
        if not isinstance(factor, Integral) or isinstance(factor, bool) or factor < 1:
            raise ValueError(
                f"factor should be a whole number of at least 1, as the old sites have to stay; got {factor!r}."
            )
        return type(self)(self.origin, self.basis / int(factor))

    def split(self, factor: int) -> Self:
        """Cut every cell into ``factor**2`` equal ones and take their centres; :meth:`refine` keeps the old sites.

        So the bins of Visium HD lie within each other: a bin of 16 um is 2 x 2 of 8 um and 8 x 8 of 2 um. Site (i, j)
        becomes the sites from ``factor * (i, j)`` on.

        Raises
        ------
        ValueError
            ``factor`` is no whole number of at least 1.

        Examples
        --------
        >>> Lattice.square(16.0, origin=(8.0, 8.0)).split(2).points([[0, 0], [1, 1]]).tolist()
        [[4.0, 4.0], [12.0, 12.0]]
        """
        fine = self.refine(factor)
        return type(self)(self.origin - (factor - 1) / 2 * fine.basis.sum(axis=0), fine.basis)

    def cover(self, xy: ArrayLike, max_distance: float) -> NDArray[np.int64]:
        """All sites that are within ``max_distance`` of any spot.

        The tissue's part of a dense grid. Only blocks of sites that a spot can reach are looked at, so time and memory
        go with the tissue and not with the slide around it.

        Parameters
        ----------
        xy
            (n, 2) pixels: spots.
        max_distance
            Pixels, from site to spot.

        Returns
        -------
        (m, 2) indices, sorted by the first, then the second.

        Raises
        ------
        ValueError
            Positions that are not finite, or ``max_distance`` that is negative or not finite.

        Examples
        --------
        >>> Lattice.square(1.0).cover([[0.0, 0.0]], 1.0).tolist()
        [[-1, 0], [0, -1], [0, 0], [0, 1], [1, 0]]
        """
        spots, max_distance = _positions(xy), _length(max_distance, "max_distance", or_zero=True)
        basis, change = _reduce(self.basis)
        dual = np.linalg.inv(basis)
        half = max_distance * np.linalg.norm(dual, axis=0) + 1e-6  # half-widths of a disc, in sites; rounding apart
        side = np.ceil(2 * half).astype(np.int64)  # a disc then touches no block but those that hold its four corners
        place = (spots - self.origin) @ dual
        corners = [np.floor((place + half * sign) / side).astype(np.int64) for sign in product((-1, 1), repeat=2)]
        blocks = _unique_rows(np.concatenate(corners))
        cells = np.indices(side).reshape(2, -1).T
        tree = cKDTree(spots)
        found = [np.empty((0, 2), dtype=np.int64)]
        for some in np.array_split(blocks, max(1, len(blocks) * len(cells) // BATCH)):
            site = (some[:, None] * side + cells).reshape(-1, 2) @ change
            found.append(site[_reached(tree, self.points(site), max_distance)])
        return _unique_rows(np.concatenate(found))


def nearest(points: ArrayLike, xy: ArrayLike, k: int = 1) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distance to the ``k`` nearest spots of every point, and their rows, nearest first.

    On a lattice many spots are equally far. The spots are put in the order of their positions before the search, so
    that which of them are taken depends neither on the order of the spots nor on that of the points.

    Parameters
    ----------
    points
        (m, 2) pixels: where to look from.
    xy
        (n, 2) pixels: spots.
    k
        Spots for each point.

    Returns
    -------
    Distances (m, k) in pixels, and rows of ``xy`` (m, k).

    Raises
    ------
    ValueError
        Positions that are not finite, ``k`` below 1 or above the number of spots.

    Examples
    --------
    >>> distance, row = nearest([[0.0, 1.0]], [[0.0, 9.0], [0.0, 0.0], [3.0, 5.0]], k=2)
    >>> distance.tolist(), row.tolist()
    ([[1.0, 5.0]], [[1, 2]])
    """
    points, spots = _positions(points, "points"), _positions(xy)
    if not 1 <= k <= len(spots):
        raise ValueError(f"k should be from 1 to the number of spots, {len(spots)}; got {k}.")
    order = np.lexsort(spots.T)
    distance, row = cKDTree(spots[order]).query(points, k=np.arange(1, k + 1), workers=-1)
    return distance, order[row]


def within(points: ArrayLike, xy: ArrayLike, max_distance: float) -> NDArray[np.bool_]:
    """Which points are at most ``max_distance`` from any spot.

    Far from every measurement a prediction is an extrapolation, and off the tissue it means nothing. It is the
    distance mask of verde (Uieda 2018, doi:10.21105/joss.00957).

    Parameters
    ----------
    points
        (m, 2) pixels.
    xy
        (n, 2) pixels: spots; without any, no point is within.
    max_distance
        Pixels.

    Returns
    -------
    (m,) mask.

    Raises
    ------
    ValueError
        Positions that are not finite, or ``max_distance`` that is negative or not finite.

    Examples
    --------
    >>> within([[0.0, 0.0], [0.0, 3.0]], [[0.0, 1.0]], 1.5).tolist()
    [True, False]
    """
    tree = cKDTree(_positions(xy))
    return _reached(tree, _positions(points, "points"), _length(max_distance, "max_distance", or_zero=True))


def spacing(xy: ArrayLike) -> float:
    """Pitch of the array that the spots lie on, pixels.

    The unit in which models count distance. The nearest neighbour is no measure of it: print jitter makes the median
    6 % too short on a Spatial Transcriptomics slide, and empty sites make it too long. Only spots that form no
    lattice, such as cells, get their median nearest-neighbour distance, and a log line says so.

    Parameters
    ----------
    xy
        (n, 2) pixels; a position that occurs twice counts once.

    Raises
    ------
    ValueError
        Positions that are not finite, or fewer than two different ones.

    Examples
    --------
    >>> round(spacing(Lattice.hexagonal(7.0).cover([[0.0, 0.0]], 20.0) @ Lattice.hexagonal(7.0).basis), 6)
    7.0
    >>> spacing([[0.0, 0.0], [0.0, 2.0], [5.0, 2.0]])
    2.0
    """
    spots = _distinct(_positions(xy))
    if len(spots) < 2:
        raise ValueError(f"a spacing needs at least two different positions; there are {len(spots)}.")
    try:
        return Lattice.fit(spots).pitch
    except ValueError as reason:
        median = float(np.median(nearest(spots, spots, k=2)[0][:, 1]))
        logger.info("spacing is the median nearest-neighbour distance, %.4g: %s", median, reason)
        return median


def hold_out(xy: ArrayLike, fraction: float = 0.5, *, block: float | None = None, seed: int) -> NDArray[np.bool_]:
    """Choose spots to hide, at random or in whole square blocks.

    A spot whose neighbours are known is easy to guess, so a score on single hidden spots tells how well a method fills
    gaps. Hiding whole blocks keeps the neighbours from telling and scores what lies further off, as
    ``BlockShuffleSplit`` of verde does (Uieda 2018, doi:10.21105/joss.00957).

    Parameters
    ----------
    xy
        (n, 2) pixels: spots.
    fraction
        Share of the spots to hide, between 0 and 1.
    block
        Side of the blocks in the units of ``xy``; None hides spots one by one.
    seed
        Of the random choice.

    Returns
    -------
    (n,) mask, True where hidden: ``round(fraction * n)`` spots, or whole blocks in random order up to where their
    count of spots is closest to that, with at least one block hidden and one left.

    Raises
    ------
    ValueError
        ``fraction`` not between 0 and 1, ``block`` not positive, or all spots in one block.

    Examples
    --------
    >>> spots = [[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]]
    >>> hold_out(spots, 0.5, block=5.0, seed=0).tolist()
    [True, True, False, False]
    """
    spots, random = _positions(xy), np.random.default_rng(seed)
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction should lie between 0 and 1, so that spots are hidden and spots are left; got {fraction}."
        )
    if block is None:
        return random.permutation(len(spots)) < round(fraction * len(spots))
    cell = np.floor((spots - spots.min(axis=0)) / _length(block, "block")).astype(np.int64)
    names, member, size = np.unique(_codes(cell), return_inverse=True, return_counts=True)
    if len(names) < 2:
        width, height = np.ptp(spots, axis=0)
        raise ValueError(
            f"one block of side {block:g} holds all {len(spots)} spots, {width:g} wide and {height:g} high: choose "
            "smaller blocks."
        )
    order = random.permutation(len(names))
    missed = np.abs(np.cumsum(size[order])[:-1] - fraction * len(spots))
    return np.isin(member, order[: missed.argmin() + 1])


def _positions(xy: ArrayLike, name: str = "xy") -> NDArray[np.float64]:
    array = np.asarray(xy, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{name} should have two columns, shape (n, 2); its shape is {array.shape}.")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(f"{bad.sum()} of {len(array)} rows of {name} are NaN or infinite: leave them out.")
    return array


def _distinct(spots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions without those that are there before, sorted; complex numbers sort far faster than rows do."""
    place = np.sort(spots[:, 0] + 1j * spots[:, 1])
    place = place[np.diff(place, prepend=np.nan) != 0]
    return np.stack([place.real, place.imag], axis=1)


def _length(value: float, name: str, *, or_zero: bool = False) -> float:
    if not (0 <= value < np.inf) or (value == 0 and not or_zero):
        raise ValueError(f"{name} should be a finite length{' or 0' if or_zero else ' above 0'}; got {value}.")
    return float(value)


def _codes(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for each row (i, j), in the order of i, then j: sorts far faster than rows do."""
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    low, high = rows.min(axis=0), rows.max(axis=0)
    codes: NDArray[np.int64] = (rows[:, 0] - low[0]) * (high[1] - low[1] + 1) + rows[:, 1] - low[1]
    return codes


def _unique_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.unique(_codes(rows), return_index=True)[1]]


def _reached(tree: cKDTree, points: NDArray[np.float64], max_distance: float) -> NDArray[np.bool_]:
    # the tree drops what lies at its bound itself, which has to stay; 1e-150 can still be squared
    distance, _ = tree.query(points, distance_upper_bound=max_distance * (1 + 1e-9) + 1e-150, workers=-1)
    return np.asarray(distance <= max_distance)


def _area(basis: NDArray[np.float64]) -> float:
    return float(abs(np.linalg.det(basis)))


def _alike(*vectors: NDArray[np.float64]) -> bool:
    lengths = np.linalg.norm(vectors, axis=1)
    return bool(lengths.max() < ALIKE * lengths.min())


def _reduce(basis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Shortest vectors of the lattice at an acute angle, and the integers that make them of ``basis`` (Lagrange)."""
    change = np.eye(2, dtype=np.int64)
    while True:
        a, b = change @ basis
        if b @ b < (1 - 1e-9) * (a @ a):
            change = change[::-1]
            continue
        times = (a @ b) / (a @ a)
        if abs(times) <= 0.5 + 1e-9:  # a hexagonal lattice is at 0.5, where rounding must not flip it for ever
            break
        change = change - np.outer([0, 1], np.rint(times).astype(np.int64) * change[0])
    change = change * np.array([[1], [-1 if a @ b < 0 else 1]])
    return change @ basis, change


def _nearest_site(offset: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the indices, as floats, of the sites nearest to ``offset``; ``basis`` has to be of shortest vectors.

    The triangles that those make are not obtuse, so the nearest site is a corner of the cell, but not always the one
    that rounding the coordinates gives.
    """
    low = np.floor(offset @ np.linalg.inv(basis))
    site, least = low, np.full(len(low), np.inf)
    for corner in product((0, 1), repeat=2):
        tried = low + corner
        apart = offset - tried @ basis
        squared = np.einsum("ij,ij->i", apart, apart)
        site = np.where((squared < least)[:, None], tried, site)
        least = np.minimum(squared, least)
    return site


def _differences(spots: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Differences between spots by increasing length, and the median distance of nearest neighbours.

    Near ones are taken around up to 1000 spots, thinned out with distance, far ones between up to 300.
    """
    random = np.random.default_rng(0)  # every n-th spot of a table may all lie in one column of the array
    around, between = (spots[random.permutation(len(spots))[:most]] for most in (1000, 300))
    ranks = np.unique([*range(2, 26), *(24 * 1.4 ** np.arange(1, 8)).astype(int)])
    distance, row = cKDTree(spots, balanced_tree=False).query(around, k=ranks[ranks <= len(spots)])
    first, second = np.triu_indices(len(between), k=1)
    steps = np.concatenate([(spots[row] - around[:, None]).reshape(-1, 2), between[first] - between[second]])
    return steps[np.argsort(np.linalg.norm(steps, axis=1))], float(np.median(distance[:, 0]))


def _basis(steps: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Basis of the lattice that differences between spots fall on.

    Of the lattices that the waves in the near differences propose, the one with the least squared misfit for the area
    of its cell is fitted on: a finer one has no less misfit on less area, a coarser one far more.
    """
    length = np.linalg.norm(steps, axis=1)
    near = steps[length < 4 * scale]
    near = near[:: -(-len(near) // 3000)]
    pairs = [np.array(pair) for pair in combinations(_peaks(near, scale), 2)]
    wide = [pair for pair in pairs if _area(pair) > 0.4 * np.linalg.norm(pair, axis=1).prod()]
    if not wide:
        raise ValueError(
            f"the spots form no lattice: the {len(steps)} differences between them do not repeat in two directions. "
            "Do they lie along one line, or are they cells? Give a Lattice or the points themselves."
        )
    proposed = [_fit_steps(np.linalg.inv(pair).T, near) for pair in wide]
    basis = min(proposed, key=lambda basis: _misfit(basis, near, scale))
    known, count = 4 * scale, 0
    while count < len(steps):
        known *= 1.5
        count = int(np.searchsorted(length, known))
        basis = _fit_steps(basis, steps[:count])
    return basis


def _misfit(basis: NDArray[np.float64], steps: NDArray[np.float64], scale: float) -> float:
    miss = steps - _nearest_site(steps, basis) @ basis
    floor = 0.01 * scale  # without any misfit at all the coarsest lattice is to win
    return float(((miss**2).sum(axis=1).mean() + floor**2) / _area(basis))


def _fit_steps(basis: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Basis by least squares, with each difference on the site that the given basis puts it on."""
    basis = _reduce(basis)[0]
    site = _nearest_site(steps, basis)
    change, *_ = np.linalg.lstsq(site, steps - site @ basis, rcond=None)  # none in a direction that no step takes
    return _reduce(basis + change)[0]


def _peaks(near: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Up to 12 shortest vectors, cycles per pixel, at which waves repeat as the differences do; of k and -k one."""
    half = 67
    k = np.arange(-half, half + 1) * 0.06 / scale  # up to 4 / scale: lattices of which one site in a hundred is taken
    wave_x, wave_y = np.exp(2j * np.pi * near[:, 0, None] * k), np.exp(2j * np.pi * near[:, 1, None] * k)
    strength = (wave_x.T @ wave_y).real / len(near)  # 1 where all differences are whole numbers of waves
    peak = np.argwhere((strength == maximum_filter(strength, 5)) & (strength > 0.2)) - half
    peak = peak[(peak[:, 1] > 0) | ((peak[:, 1] == 0) & (peak[:, 0] > 0))]
    shortest: NDArray[np.float64] = k[peak[np.argsort((peak**2).sum(axis=1), kind="stable")[:12]] + half]
    return shortest


def _settle(spots: NDArray[np.float64], basis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Origin and basis by least squares over all spots, each on its nearest site."""
    centre = spots.mean(axis=0)
    offset = spots - centre
    phase = np.exp(2j * np.pi * offset @ np.linalg.inv(basis)).mean(axis=0)
    origin, site = np.angle(phase) / (2 * np.pi) @ basis, np.empty((0, 2))
    for _ in range(10):  # two or three change anything
        before, site = site, _nearest_site(offset - origin, basis)
        if np.array_equal(site, before):
            break
        middle = site.mean(axis=0)
        spread = (site - middle).T @ (site - middle)
        if np.linalg.matrix_rank(spread) < 2:
            raise ValueError(f"the {len(spots)} spots lie along one line, which leaves the lattice open across it.")
        basis = np.linalg.solve(spread, (site - middle).T @ offset)
        origin = -middle @ basis
    return centre + origin, _canonical(basis)


def _canonical(basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the equivalent pairs of shortest vectors the one that :meth:`Lattice.fit` promises."""
    a, b = _reduce(basis)[0]
    choices = [sign * v for v in ([a, b, b - a] if _alike(a, b, b - a) else [a, b]) for sign in (1, -1)]
    towards = np.array([np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))])
    first = max(choices, key=lambda v: float(v @ towards / np.linalg.norm(v)))
    left = [v for v in choices if first[0] * v[1] - first[1] * v[0] > 1e-6 * (first @ first)]
    return np.array([first, max(left, key=lambda v: float(first @ v))])


def _check_fit(residual: NDArray[np.float64], site: NDArray[np.int64], pitch: float) -> None:
    apart = float(np.sqrt((residual**2).sum() / (len(residual) - 3))) / pitch  # three vectors were fitted
    shared = 1 - len(_unique_rows(site)) / len(site)
    # random spots lie about 0.4 off, but a few are near some lattice by chance: one time in twenty within this
    most = min(0.23, 0.32 * np.exp(-8 / len(site)))
    if apart > most or shared > MOST_SHARED:
        raise ValueError(
            f"the {len(site)} spots form no lattice: on the best one, of pitch {pitch:.4g}, they lie {apart:.2f} of "
            f"the pitch off their sites (at most {most:.2f}) and {shared:.0%} share a site with another spot (at most "
            f"{MOST_SHARED:.0%}). Are these several sections, or cells? Give a Lattice or the points themselves."
        )
