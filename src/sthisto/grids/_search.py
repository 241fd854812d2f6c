"""The lattice of the spots, found from their positions alone; see :meth:`Lattice.fit`."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter
from scipy.spatial import cKDTree

from sthisto.grids._basis import area, nearest_site, reduce, similar_lengths
from sthisto.grids._positions import unique_rows

MOST_SHARED = 0.02  # share of the spots that jitter may put on a site that another spot has


def find(spots: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Origin (2,) and basis (2, 2) of the lattice that the spots (n, 2) are on."""
    return _settle(spots, _basis(*_differences(spots)))


def _differences(spots: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Differences between spots by increasing length, and the median distance of nearest neighbors.

    Near ones are taken around up to 1000 spots, thinned out with distance, far ones between up to 300.
    """
    random = np.random.default_rng(0)  # every n-th spot of a table may all be in one column of the array
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
    wide = [pair for pair in pairs if area(pair) > 0.4 * np.linalg.norm(pair, axis=1).prod()]
    if not wide:
        raise ValueError(
            f"the spots form no lattice: the {len(steps)} differences between them do not repeat in two directions. "
            "Are they on one line, or are they cells? Give a Lattice or the points themselves."
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
    miss = steps - nearest_site(steps, basis) @ basis
    floor = 0.01 * scale  # without any misfit at all the coarsest lattice is to win
    return float(((miss**2).sum(axis=1).mean() + floor**2) / area(basis))


def _fit_steps(basis: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Basis by least squares, with each difference on the site that the given basis puts it on."""
    basis = reduce(basis)[0]
    site = nearest_site(steps, basis)
    change, *_ = np.linalg.lstsq(site, steps - site @ basis, rcond=None)  # none in a direction that no step takes
    return reduce(basis + change)[0]


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
        before, site = site, nearest_site(offset - origin, basis)
        if np.array_equal(site, before):
            break
        middle = site.mean(axis=0)
        spread = (site - middle).T @ (site - middle)
        if np.linalg.matrix_rank(spread) < 2:
            raise ValueError(f"the {len(spots)} spots are on one line, which leaves the lattice open across it.")
        basis = np.linalg.solve(spread, (site - middle).T @ offset)
        origin = -middle @ basis
    return centre + origin, _canonical(basis)


def _canonical(basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the equivalent pairs of shortest vectors the one that :meth:`Lattice.fit` promises."""
    a, b = reduce(basis)[0]
    choices = [sign * v for v in ([a, b, b - a] if similar_lengths(a, b, b - a) else [a, b]) for sign in (1, -1)]
    towards = np.array([np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))])
    first = max(choices, key=lambda v: float(v @ towards / np.linalg.norm(v)))
    left = [v for v in choices if first[0] * v[1] - first[1] * v[0] > 1e-6 * (first @ first)]
    return np.array([first, max(left, key=lambda v: float(first @ v))])


def check_fit(residual: NDArray[np.float64], site: NDArray[np.int64], pitch: float) -> None:
    apart = float(np.sqrt((residual**2).sum() / (len(residual) - 3))) / pitch  # three vectors were fitted
    shared = 1 - len(unique_rows(site)) / len(site)
    # random spots are about 0.4 off, but a few are near some lattice by chance: one time in twenty within this
    most = min(0.23, 0.32 * np.exp(-8 / len(site)))
    if apart > most or shared > MOST_SHARED:
        raise ValueError(
            f"the {len(site)} spots form no lattice: on the best one, of pitch {pitch:.4g}, they are {apart:.2f} of "
            f"the pitch off their sites (at most {most:.2f}) and {shared:.0%} share a site with another spot (at most "
            f"{MOST_SHARED:.0%}). Are these several sections, or cells? Give a Lattice or the points themselves."
        )
