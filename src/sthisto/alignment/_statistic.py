"""How much of the expression the image predicts in blocks that are held out, for any positions of the spots."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sthisto import grids
from sthisto._statistics import leading_components

N_FACTORS = 8
BLOCK = 4.0  # pitches
N_FOLDS = 5
RIDGES = (1.0, 10.0)  # averaged, as in the gene test
LEAK = 0.2  # of the loss of a factor that is predicted worse than by its mean, which is noise
FLOOR = 1e-3  # of the unpredicted share of variance

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


def expression_factors(expression: Singles) -> Singles:
    """Scores (n, 8) of the leading principal components of log-normalized expression (n, g).

    Examples
    --------
    >>> expression_factors(np.eye(3, dtype=np.float32)).shape
    (3, 2)
    """
    centered = expression - expression.mean(axis=0, dtype=np.float64)
    scores: Singles = (centered @ leading_components([centered], N_FACTORS)).astype(np.float32)
    return scores


@dataclass(frozen=True, eq=False)
class HeldOutRidge:
    """Ridge regression of expression factors on the image's kernel components, with blocks of spots held out.

    The blocks are those of the array and stay the same when the spots are moved over the image, so that values compare.

    Attributes
    ----------
    factors
        (n, q) float32; or (c, n, q), others for each of c sets of positions.
    fold
        (n,) of whole blocks.
    """

    factors: Singles
    fold: NDArray[np.intp]

    @classmethod
    def of(cls, xy: Floats, factors: Singles, *, block: float = BLOCK, random_state: int = 0) -> "HeldOutRidge":
        """Divide spots at ``xy`` (n, 2), in pitches, into folds of blocks.

        Raises ValueError where all spots are in one block.
        """
        random = np.random.default_rng(random_state)
        member, size = grids.blocks(xy, block, offset=random.uniform(0, block, 2))
        if len(size) < 2:
            raise ValueError(f"one block of {block:g} pitches holds all {len(xy)} spots: too few to hold out blocks.")
        fold = np.empty(len(size), dtype=np.intp)
        fold[np.argsort(-size - random.uniform(size=len(size)))] = np.arange(len(size)) % min(N_FOLDS, len(size))
        return cls(factors - factors.mean(axis=-2, keepdims=True), fold[member])

    def of_factors(self, factors: Singles) -> "HeldOutRidge":
        """Predict other factors with the same folds."""
        return replace(self, factors=factors)

    def errors(self, components: Singles, factors: Singles | None = None) -> Singles:
        """Sum of squared held-out errors (c, q) by components (c, n, m), without the predictions themselves.

        The spots enter by their products alone, so that factors of many surrogates cost little more than one's.
        """
        y = self.factors if factors is None else factors
        c, _, m = components.shape
        parts = []
        for rows in self._rows():
            x, held = components[:, rows], y[..., rows, :]
            across = np.ascontiguousarray(x.transpose(0, 2, 1))
            # One large product where the factors are the same for all.
            xy = (across.reshape(c * m, -1) @ held).reshape(c, m, -1) if y.ndim == 2 else across @ held
            parts.append(_Sums(len(rows), across @ x, xy, x.sum(1)[:, :, None], held.sum(-2)[..., None, :]))
        whole = _Sums.total(parts)
        square = (y**2).sum(-2)
        for part in parts:
            training = whole.without(part)
            mean_x, mean_y = training.means()
            weights = _solve(training)
            gram, cross = part.about(mean_x, mean_y)
            # |y - Xw|^2 - |y|^2 with both about the means of the training spots
            square = square + np.einsum("cmq,cmq->cq", weights, gram @ weights - 2 * cross)
            square = square - (2 * mean_y * part.y - part.n * mean_y**2)[..., 0, :]
        return np.asarray(square)

    def losses(self, components: Singles, factors: Singles | None = None) -> Singles:
        """Logarithm of the share of each factor's variance (c, q) that stays unpredicted; 0 where it does not vary.

        Their mean compares candidates: the logarithm is the likelihood of the factor, and makes a weak factor that is
        predicted count as much as a strong one. A sum of variances would be that of one gradient over the section,
        which other gradients in the image predict as well.
        """
        square = ((self.factors if factors is None else factors) ** 2).sum(-2)
        error = self.errors(components, factors)
        share = np.divide(error, square, out=np.ones_like(error), where=square > 0)
        loss = np.log(np.maximum(share, FLOOR))
        softened: Singles = np.where(loss > 0, LEAK * loss, loss).astype(np.float32)
        return softened

    def spot_losses(self, components: Singles, about: Singles) -> Floats:
        """Loss of every spot (c, n): the sum over spots is linear in the errors, with the slope at those of ``about``.

        For components (c, n, m), about errors (q,) of another set.
        """
        square = (self.factors**2).sum(axis=0)
        slope = np.where(about < square, 1.0, LEAK) / np.maximum(np.minimum(about, square), 1e-12)
        return np.asarray((self.predict(components) - self.factors) ** 2 @ (slope * (square > 0)), dtype=np.float64)

    def predict(self, components: Singles) -> Singles:
        """Held-out predictions (c, n, q) by components (c, n, m)."""
        predicted = np.empty((len(components), *self.factors.shape[-2:]), dtype=np.float32)
        for rows in self._rows():
            training = np.ones(len(self.fold), dtype=bool)
            training[rows] = False
            x, y = components[:, training], np.broadcast_to(self.factors, predicted.shape)[:, training]
            sums = _Sums(
                int(training.sum()),
                x.transpose(0, 2, 1) @ x,
                x.transpose(0, 2, 1) @ y,
                x.sum(1)[:, :, None],
                y.sum(1)[:, None],
            )
            mean_x = (sums.x / sums.n).transpose(0, 2, 1)
            predicted[:, rows] = (components[:, rows] - mean_x) @ _solve(sums) + sums.y / sums.n
        return predicted

    def _rows(self) -> list[NDArray[np.intp]]:
        return [np.flatnonzero(self.fold == each) for each in range(1 + int(self.fold.max()))]


@dataclass(frozen=True, eq=False)
class _Sums:
    """Number of spots and sums over them: (c, m, m) and (c, m, q) of products, (c, m, 1) and ([c,] 1, q) of values."""

    n: int
    xx: Singles
    xy: Singles
    x: Singles
    y: Singles

    @classmethod
    def total(cls, parts: "list[_Sums]") -> "_Sums":
        first, *others = parts
        for each in others:
            first = cls(first.n + each.n, first.xx + each.xx, first.xy + each.xy, first.x + each.x, first.y + each.y)
        return first

    def without(self, part: "_Sums") -> "_Sums":
        return _Sums(self.n - part.n, self.xx - part.xx, self.xy - part.xy, self.x - part.x, self.y - part.y)

    def means(self) -> tuple[Singles, Singles]:
        n = np.float32(self.n)
        return self.x / n, self.y / n

    def about(self, mean_x: Singles, mean_y: Singles) -> tuple[Singles, Singles]:
        """Products (c, m, m) and (c, m, q) of the deviations from means (c, m, 1) and ([c,] 1, q)."""
        across, n = mean_x.transpose(0, 2, 1), np.float32(self.n)
        gram = self.xx - mean_x * self.x.transpose(0, 2, 1) - self.x * across + n * mean_x * across
        return gram, self.xy - mean_x * (self.y - n * mean_y) - self.x * mean_y


def _solve(training: _Sums) -> Singles:
    """Weights (c, m, q), averaged over the ridges."""
    gram, cross = training.about(*training.means())
    eye = np.eye(gram.shape[1], dtype=np.float32)
    grams = np.stack([gram + np.float32(ridge) * eye for ridge in RIDGES])
    few = cross.shape[-1] < gram.shape[-1]  # then solving is cheaper than inverting
    weights: Singles = np.linalg.solve(grams, cross).mean(axis=0) if few else np.linalg.inv(grams).mean(axis=0) @ cross
    return weights
