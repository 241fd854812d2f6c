"""Whether spots are registered to an image: the search, its null distribution, and the verdict."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sthisto import grids
from sthisto.alignment._raster import FeatureRaster
from sthisto.alignment._search import MAX_SHIFT, Search
from sthisto.alignment._statistic import BLOCK, HeldOutRidge, expression_factors
from sthisto.alignment._transform import SYMMETRIES, Similarity
from sthisto.uncertainty import spectral_surrogates

VERDICTS = ("aligned", "misaligned", "undecidable")
MAX_SPOTS = 1200  # of a section: more change nothing
COARSE_SPOTS = 400  # of these, in the coarse search
MIN_SPOTS = 40
TOLERANCE = 0.35  # pitches, below which a displacement is no misalignment
FARTHEST = 0.6  # pitches between an aligned section and the maximum of the statistic
LEVEL = 0.02  # of the test whether the image predicts expression where the spots are
GAIN_LEVEL = 0.05  # of the test whether it predicts more elsewhere
GAIN_Z = 2.0  # standard errors over blocks that the gain has to exceed, too
N_SURROGATES = 199
N_SIMULATED = 39
SIMULATED_CANDIDATES = 2000  # of the coarse search, for each simulated section
PROFILE_STEP = 0.5  # pitches

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """What is known of the registration of one section.

    Attributes
    ----------
    verdict
        One of :data:`VERDICTS`.
    evidence
        Why, in a sentence with the figures.
    statistic, best_statistic
        Share of the variance of the expression factors that the image predicts with blocks held out: for the spots
        where they are, and under the best transformation. Negative where a mean predicts better.
    p_value
        Of the statistic, against surrogates of the same autocorrelation where the spots are.
    gain_p_value
        Of the gain of the best transformation, against sections that are aligned, searched in the same way; 1 where
        it moves the spots by less than 0.35 pitches.
    transformation
        The best, on full-resolution pixels.
    displacement
        Root mean square distance by which it moves the spots, pitches.
    inside
        Share of the spots inside the image.
    resolution
        Largest shift, in pitches, that the data do not distinguish from the best; NaN where the verdict is open.
    symmetries
        Statistic under each symmetry about the center of the spots.
    shifts, profile
        Shifts (k,) in pitches, and the statistic (k, k) of the spots moved by them along y and x.
    rotations, rotation_profile, scales, scale_profile
        Degrees and factors, and the statistic under them.
    n_spots
        Spots used.
    """

    verdict: str
    evidence: str
    statistic: float
    best_statistic: float
    p_value: float
    gain_p_value: float
    transformation: Similarity
    displacement: float
    inside: float
    resolution: float
    symmetries: dict[str, float]
    shifts: Floats
    profile: Floats
    rotations: Floats
    rotation_profile: Floats
    scales: Floats
    scale_profile: Floats
    n_spots: int


def check(raster: FeatureRaster, xy: Floats, expression: Singles, *, pitch: float, random_state: int = 0) -> Alignment:
    """Check whether the spots of a section are registered to its image.

    The statistic is the share of the variance of the first 8 expression factors that kernel ridge regression on image
    features predicts in blocks of 4 pitches that are held out. Its maximum is searched over the 8 symmetries of the
    square, rotations of 15 degrees, scales of 10 % and shifts of 3 pitches, and from there by descent. Two null
    distributions turn it into a verdict, both made of surrogates with the autocorrelation of the data:

    - Does the image predict expression where the spots are? Surrogates of the factors, in the same place.
    - Does it predict more elsewhere? Sections that are aligned: what the image predicts where the spots are, plus
      surrogates of the residual. The search is repeated on each, so that the gain is corrected for it.

    Parameters
    ----------
    raster
        Features of the whole image.
    xy
        (n, 2) pixels of the image, also outside of it; at most 1 200 spots are used, and fewer than 40 stay
        undecidable.
    expression
        (n, g) log-normalized.
    pitch
        Pixels between neighboring spots.
    random_state
        Of the choice of spots, the folds and the surrogates.

    Raises
    ------
    ValueError
        All spots are in one block.
    """
    random = np.random.default_rng(random_state)
    rows = np.sort(random.permutation(len(xy))[:MAX_SPOTS])
    xy = xy[rows]
    ridge = HeldOutRidge.of(xy / pitch, expression_factors(expression[rows]), random_state=random_state)
    search = Search.of(raster.kernel_components(random_state=random_state), ridge, xy, pitch)
    coarse_rows = np.sort(random.permutation(len(xy))[:COARSE_SPOTS])
    optima, losses = _optima(search, coarse_rows)
    best, least = optima[:1], float(losses[0])
    p_value = _p_value(search, random)
    displacement = float(search.displacement(best)[0])
    z = _gain_z(search, np.concatenate([search.identity, best]))[0]
    gain_p_value = 1.0
    if displacement > TOLERANCE and z > GAIN_Z:
        gain_p_value = _gain_p_value(search, coarse_rows, least, random)
    return _result(search, best[0], p_value=p_value, gain_p_value=gain_p_value)


def _statistics(search: Search, candidates: Floats) -> Floats:
    """Share of variance predicted (k,), a geometric mean over the factors."""
    shares: Floats = -np.expm1(search.losses(candidates).mean(axis=1, dtype=np.float64))
    return shares


def _optima(search: Search, coarse_rows: NDArray[np.intp]) -> tuple[Floats, Singles]:
    """Local optima (k, 5) of the search, best first, and their losses; the identity is one of its starts."""
    coarse = search.keep(coarse_rows)
    candidates = coarse.coarse()
    starts = coarse.starts(candidates, coarse.losses(candidates).sum(axis=1))
    starts = np.concatenate([search.identity, coarse.descend(starts, last_step=0.25)[0]])
    places, losses = search.descend(starts)
    order = np.argsort(losses, kind="stable")
    return places[order], losses[order]


def _p_value(search: Search, random: np.random.Generator) -> float:
    """P-value of the statistic where the spots are."""
    factors = search.ridge.factors
    surrogates = _decorrelated(spectral_surrogates(search.xy / search.pitch, factors, N_SURROGATES, random), factors)
    null = search.losses(search.identity, _side_by_side(surrogates)).reshape(N_SURROGATES, -1).sum(axis=1)
    measured = float(search.losses(search.identity).sum())
    return float((1 + (null <= measured).sum()) / (1 + N_SURROGATES))


def _decorrelated(surrogates: Singles, factors: Singles) -> Singles:
    """Surrogates (b, n, q) rotated to the covariance of the factors (n, q), which are principal components.

    Otherwise several of them may resemble one gradient of the image, which factors that are uncorrelated cannot.
    """
    norm = np.sqrt((factors.astype(np.float64) ** 2).sum(axis=0)).clip(1e-12)
    scaled = (surrogates - surrogates.mean(axis=1, keepdims=True)) / norm
    values, vectors = np.linalg.eigh(scaled.transpose(0, 2, 1) @ scaled)
    root = np.divide(1, np.sqrt(values), out=np.zeros_like(values), where=values > 1e-9 * values[:, -1:])
    rotated = scaled @ ((vectors * root[:, None]) @ vectors.transpose(0, 2, 1))
    found: Singles = (rotated * norm).astype(np.float32)
    return found


def _side_by_side(factors: Singles) -> Singles:
    """Factors (b, n, q) as (n, b q)."""
    return np.ascontiguousarray(factors.transpose(1, 0, 2).reshape(factors.shape[1], -1))


def _gain_p_value(search: Search, coarse_rows: NDArray[np.intp], least: float, random: np.random.Generator) -> float:
    """P-value of what the best transformation gains, among sections that are aligned where the spots are."""
    factors = search.ridge.factors
    predicted = search.ridge.predict(search.raster.at(search.positions(search.identity)))[0]
    predicted -= predicted.mean(axis=0)
    square = (predicted**2).sum(axis=0)
    slope = np.divide((predicted * factors).sum(axis=0), square, out=np.zeros_like(square), where=square > 0)
    signal = predicted * slope.clip(0, None)  # what is predicted worse than by the mean is no signal
    residual = spectral_surrogates(search.xy / search.pitch, factors - signal, N_SIMULATED, random)
    simulated = _decorrelated(signal + residual, factors)
    coarse = search.keep(coarse_rows)
    candidates = coarse.coarse()
    candidates = candidates[np.sort(random.permutation(len(candidates))[:SIMULATED_CANDIDATES])]
    own = simulated[:, coarse_rows]
    errors = coarse.losses(candidates, _side_by_side(own)).reshape(len(candidates), N_SIMULATED, -1).sum(axis=2)
    order = np.argpartition(errors, 2, axis=0)[:2].T.ravel()  # two of each section
    starts, _ = coarse.descend(candidates[order], np.repeat(own, 2, axis=0), last_step=0.25)
    starts = np.concatenate([starts, np.repeat(search.identity, N_SIMULATED, axis=0)])
    _, found = search.descend(starts, np.concatenate([np.repeat(simulated, 2, axis=0), simulated]), last_step=0.12)
    at_best = np.concatenate([found[: 2 * N_SIMULATED].reshape(-1, 2), found[2 * N_SIMULATED :, None]], axis=1).min(
        axis=1
    )
    where = search.losses(np.repeat(search.identity, N_SIMULATED, axis=0), simulated).sum(axis=1)
    gain, measured = _gain(where, at_best), _gain(search.losses(search.identity).sum(axis=1), np.array([least]))
    return float((1 + (gain >= measured).sum()) / (1 + N_SIMULATED))


def _gain(where: Floats, at_best: Floats) -> Floats:
    """Loss by which the best falls below that where the spots are, or that of the mean.

    Where the image predicts nothing, how much worse than the mean it is only adds noise.
    """
    gain: Floats = np.minimum(where, 0) - at_best
    return gain


def _gain_z(search: Search, candidates: Floats) -> Floats:
    """What the last candidate gains over each (k,), in standard errors over blocks."""
    components = search.raster.at(search.positions(candidates))
    error = search.ridge.spot_losses(components, search.ridge.errors(components[-1:])[0])
    member, size = grids.blocks(search.xy / search.pitch, BLOCK)
    gain = np.stack([np.bincount(member, each - error[-1], len(size)) for each in error])
    spread = np.sqrt(((gain - gain.mean(axis=1, keepdims=True)) ** 2).sum(axis=1))
    z: Floats = np.divide(gain.sum(axis=1), spread, out=np.zeros(len(gain)), where=spread > 0)
    return z


def _result(search: Search, best: Floats, *, p_value: float, gain_p_value: float) -> Alignment:
    """Put everything together, with the profiles of the statistic around the spots' place."""
    identity, displacement = search.identity, float(search.displacement(best[None])[0])
    line = np.arange(-MAX_SHIFT, MAX_SHIFT + PROFILE_STEP / 2, PROFILE_STEP)
    shifted = np.repeat(identity, len(line) ** 2, axis=0)
    shifted[:, 3:] += np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    degrees, factors = np.linspace(-15, 15, 13), np.linspace(0.9, 1.1, 9)
    turned, scaled = np.repeat(identity, len(degrees), axis=0), np.repeat(identity, len(factors), axis=0)
    turned[:, 1], scaled[:, 2] = np.deg2rad(degrees) * search.radius, np.log(factors) * search.radius
    symmetric = np.repeat(identity, len(SYMMETRIES), axis=0)
    symmetric[:, 0] = np.arange(len(SYMMETRIES))
    statistic, best_statistic = _statistics(search, np.concatenate([identity, best[None]])).tolist()
    decidable = len(search.xy) >= MIN_SPOTS
    verdict = _verdict(statistic, p_value, gain_p_value, displacement) if decidable else "undecidable"
    around = np.repeat(best[None], len(shifted), axis=0)
    around[:, 3:] += shifted[:, 3:] - identity[:, 3:]
    alike = _gain_z(search, np.concatenate([around, best[None]]))[:-1] < GAIN_Z
    resolution = float(np.linalg.norm(around[alike, 3:] - best[3:], axis=1).max(initial=0))
    result = Alignment(
        verdict=verdict,
        evidence="",
        statistic=statistic,
        best_statistic=best_statistic,
        p_value=p_value,
        gain_p_value=gain_p_value,
        transformation=search.transformation(best),
        displacement=displacement,
        inside=float(search.raster.inside(search.xy).mean()),
        resolution=float("nan") if verdict == "undecidable" else resolution,
        symmetries=dict(zip(SYMMETRIES, _statistics(search, symmetric).tolist(), strict=True)),
        shifts=line,
        profile=_statistics(search, shifted).reshape(len(line), -1),
        rotations=degrees,
        rotation_profile=_statistics(search, turned),
        scales=factors,
        scale_profile=_statistics(search, scaled),
        n_spots=len(search.xy),
    )
    return replace(result, evidence=_evidence(result))


def _verdict(statistic: float, p_value: float, gain_p_value: float, displacement: float) -> str:
    if gain_p_value <= GAIN_LEVEL:
        return "misaligned"
    # A better place further away that is not significantly better leaves the question open.
    return "aligned" if statistic > 0 and p_value <= LEVEL and displacement <= FARTHEST else "undecidable"


def _evidence(result: Alignment) -> str:
    """Figures behind the verdict."""
    predicted = (
        f"the image predicts {result.statistic:.3f} of the expression factors' variance (p = {result.p_value:.3g})"
    )
    if result.inside < 1:
        predicted += f" with {result.inside:.0%} of the spots inside the image"
    name, angle = result.transformation.parts
    moved = f"{name}, {angle:+.1f} degrees, scale {result.transformation.scale:.3f}"
    elsewhere = f"{result.best_statistic:.3f} at {result.displacement:.2f} pitches from there ({moved})"
    if result.verdict == "aligned":
        return f"{predicted}; the maximum, {elsewhere}, is not significantly larger."
    gain = f"gain p = {result.gain_p_value:.3g}"
    if result.verdict == "misaligned":
        return f"{predicted}, but {elsewhere}; {gain}, corrected for the search."
    few = f"only {result.n_spots} spots; " if result.n_spots < MIN_SPOTS else ""
    return f"{few}{predicted}; {elsewhere} ({gain})."
