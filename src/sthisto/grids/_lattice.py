"""Lattices: of the spots of an array, and denser ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import Voronoi, cKDTree

from sthisto.grids._basis import area, nearest_site, reduce, similar_lengths
from sthisto.grids._positions import distinct, length, positions, reached, unique_rows
from sthisto.grids._search import check_fit, find

FEWEST_SPOTS = 5  # three fit any lattice and a fourth too often
BATCH = 1 << 20  # sites processed together


@dataclass(frozen=True, eq=False)
class Lattice:
    """Points ``origin + i * a + j * b`` for the rows a, b of ``basis``; hexagonal, square or oblique.

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
        if area(self.basis) <= 1e-9 * lengths.prod():
            raise ValueError(f"the rows of basis should span the plane; {self.basis.tolist()} are on one line.")

    @classmethod
    def fit(cls, xy: ArrayLike) -> Self:
        """Find the lattice of the spots, from their positions alone.

        Tables seldom have the array's position on the image, and where they have, often at another scale. The
        differences between near spots repeat with the lattice, so their Fourier transform peaks at its reciprocal
        vectors, whatever the rotation and however many sites are empty. The basis found so is then fitted to longer
        and longer differences, from all pieces of tissue at once: no step is so long that the error left by the step
        before could miscount the sites, as happens where a pitch is read off neighbors and carried across the slide.
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
        the x axis towards y, so that arrays which are straight or rotated by 30, 45 or 90 degrees, as most do, are
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
        spots = positions(xy)
        if len(spots) < FEWEST_SPOTS:
            raise ValueError(f"a lattice needs at least {FEWEST_SPOTS} spots; there are {len(spots)}.")
        if again := len(spots) - len(distinct(spots)):
            raise ValueError(
                f"{again} of {len(spots)} spots are where another spot is. A lattice is fitted to one section at a "
                "time: are these several?"
            )
        lattice = cls(*find(spots))
        site = lattice.index(spots)
        check_fit(spots - lattice.points(site), site, lattice.pitch)
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
        return cls(np.asarray(origin), length(pitch, "pitch") * np.eye(2))

    @classmethod
    def hexagonal(cls, pitch: float, origin: Sequence[float] = (0.0, 0.0)) -> Self:
        """Hexagonal lattice with rows along x and ``pitch`` pixels from a site to its six neighbors.

        Raises
        ------
        ValueError
            ``pitch`` is not positive or not finite.

        Examples
        --------
        >>> Lattice.hexagonal(2.0).basis.round(3).tolist()
        [[2.0, 0.0], [1.0, 1.732]]
        """
        return cls(np.asarray(origin), length(pitch, "pitch") * np.array([[1.0, 0.0], [0.5, 0.75**0.5]]))

    @property
    def kind(self) -> Literal["hexagonal", "square", "oblique"]:
        """Hexagonal where the three shortest vectors have similar lengths (15 %), square where two do."""
        a, b = reduce(self.basis)[0]
        if similar_lengths(a, b, b - a):
            return "hexagonal"
        return "square" if similar_lengths(a, b) and similar_lengths(a + b, b - a) else "oblique"

    @property
    def pitch(self) -> float:
        """Length of the shortest lattice vector, the mean over those of similar length, pixels."""
        a, b = reduce(self.basis)[0]
        shortest = {"hexagonal": [a, b, b - a], "square": [a, b], "oblique": [a]}[self.kind]
        return float(np.linalg.norm(shortest, axis=1).mean())

    @property
    def reach(self) -> float:
        """Covering radius, pixels: no place of the plane is further from a site (hexagonal pitch/√3, square pitch/√2).

        It is the radius of the circle through the corners of the triangle that the shortest vectors make.
        """
        a, b = reduce(self.basis)[0]
        return float(np.linalg.norm([a, b, b - a], axis=1).prod() / (2 * area(self.basis)))

    @property
    def cell(self) -> NDArray[np.float64]:
        """Corners (k, 2), pixels, about a site of what is nearer to it than to any other: a square or a hexagon.

        The cells of all sites fill the plane, so that a map drawn with them has neither gaps nor overlaps.
        """
        steps = np.indices((7, 7)).reshape(2, -1).T - 3
        voronoi = Voronoi(steps @ reduce(self.basis)[0])
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
        basis, change = reduce(self.basis)
        return nearest_site(positions(xy) - self.origin, basis).astype(np.int64) @ change

    def points(self, index: ArrayLike) -> NDArray[np.float64]:
        """Give the positions of sites: indices (m, 2) -> (m, 2) pixels.

        Examples
        --------
        >>> Lattice.square(2.0, origin=(1.0, 0.0)).points([[3, 1]]).tolist()
        [[7.0, 2.0]]
        """
        return self.origin + positions(index, "index") @ self.basis

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

        So the bins of Visium HD are nested: a bin of 16 um is 2 x 2 of 8 um and 8 x 8 of 2 um. Site (i, j)
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

        The tissue's part of a dense grid. Only blocks of sites that a spot can reach are processed, so time and memory
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
        spots, max_distance = positions(xy), length(max_distance, "max_distance", or_zero=True)
        basis, change = reduce(self.basis)
        dual = np.linalg.inv(basis)
        half = max_distance * np.linalg.norm(dual, axis=0) + 1e-6  # half-widths of a disc, in sites; rounding apart
        side = np.ceil(2 * half).astype(np.int64)  # a disc then touches no block but those that hold its four corners
        place = (spots - self.origin) @ dual
        corners = [np.floor((place + half * sign) / side).astype(np.int64) for sign in product((-1, 1), repeat=2)]
        blocks = unique_rows(np.concatenate(corners))
        cells = np.indices(side).reshape(2, -1).T
        tree = cKDTree(spots)
        found = [np.empty((0, 2), dtype=np.int64)]
        for some in np.array_split(blocks, max(1, len(blocks) * len(cells) // BATCH)):
            site = (some[:, None] * side + cells).reshape(-1, 2) @ change
            found.append(site[reached(tree, self.points(site), max_distance)])
        return unique_rows(np.concatenate(found))
