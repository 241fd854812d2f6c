"""Similarity transformations of the plane: a symmetry of the square, a rotation, a scale and a shift."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# As they act on (x, y) with y pointing down: a quarter turn is clockwise to the eye.
SYMMETRIES = MappingProxyType(
    {
        "identity": np.array([[1.0, 0.0], [0.0, 1.0]]),
        "quarter turn": np.array([[0.0, -1.0], [1.0, 0.0]]),
        "half turn": np.array([[-1.0, 0.0], [0.0, -1.0]]),
        "three-quarter turn": np.array([[0.0, 1.0], [-1.0, 0.0]]),
        "flipped left to right": np.array([[-1.0, 0.0], [0.0, 1.0]]),
        "flipped top to bottom": np.array([[1.0, 0.0], [0.0, -1.0]]),
        "transposed": np.array([[0.0, 1.0], [1.0, 0.0]]),
        "anti-transposed": np.array([[0.0, -1.0], [-1.0, 0.0]]),
    }
)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Map ``xy`` to ``matrix @ xy + offset``, where ``matrix`` is a multiple of an orthogonal one.

    Attributes
    ----------
    matrix
        (2, 2).
    offset
        (2,), in the units of the positions.

    Examples
    --------
    >>> turned = Similarity.of("quarter turn", center=[1.0, 1.0])
    >>> turned([[2.0, 1.0]]).tolist(), (turned.inverse() @ turned)([[5.0, 7.0]]).tolist()
    ([[1.0, 2.0]], [[5.0, 7.0]])
    """

    matrix: Floats
    offset: Floats

    @classmethod
    def of(
        cls,
        symmetry: str = "identity",
        *,
        rotation: float = 0.0,
        scale: float = 1.0,
        shift: ArrayLike = (0.0, 0.0),
        center: ArrayLike = (0.0, 0.0),
    ) -> "Similarity":
        """Apply a symmetry, then a rotation (degrees, from x towards y) and a scale, all about a center; then shift."""
        matrix = scale * rotation_matrix(np.deg2rad(rotation)) @ SYMMETRIES[symmetry]
        middle = np.asarray(center, dtype=np.float64)
        return cls(matrix, middle + np.asarray(shift, dtype=np.float64) - matrix @ middle)

    def __call__(self, xy: ArrayLike) -> Floats:
        """Positions (n, 2), transformed."""
        moved: Floats = np.asarray(xy, dtype=np.float64) @ self.matrix.T + self.offset
        return moved

    def __matmul__(self, first: "Similarity") -> "Similarity":
        """Compose: the transformation on the right is applied first."""
        return Similarity(self.matrix @ first.matrix, self.matrix @ first.offset + self.offset)

    def inverse(self) -> "Similarity":
        """Transformation that undoes this one."""
        inverse = np.asarray(np.linalg.inv(self.matrix), dtype=np.float64)
        return Similarity(inverse, -inverse @ self.offset)

    @property
    def affine(self) -> Floats:
        """Matrix and offset side by side, (2, 3)."""
        return np.column_stack([self.matrix, self.offset])

    @property
    def scale(self) -> float:
        """Factor of all lengths."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))

    @property
    def parts(self) -> tuple[str, float]:
        """Nearest symmetry of the square, and the rotation in degrees, -45 to 45, that follows it."""
        mirrored = np.linalg.det(self.matrix) < 0
        base = SYMMETRIES["flipped left to right" if mirrored else "identity"]
        turn = self.matrix @ base
        angle = np.rad2deg(np.arctan2(turn[1, 0], turn[0, 0]))
        quarter = round(angle / 90)
        nearest = rotation_matrix(quarter * np.pi / 2) @ base
        name = min(SYMMETRIES, key=lambda each: float(np.abs(SYMMETRIES[each] - nearest).sum()))
        return name, float(angle - 90 * quarter)


def rotation_matrix(angle: float) -> Floats:
    """(2, 2) rotation by an angle in radians, from x towards y."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
