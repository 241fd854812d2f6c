"""Leading components: what varies together, without most of the noise."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA


def components(values: NDArray[np.float32], k: int, random_state: int) -> NDArray[np.float32]:
    """Scores (n, k) of the leading principal components of values (n, d); fewer where there are no more."""
    k = min(k, *values.shape)
    scores = PCA(k, svd_solver="randomized", random_state=random_state).fit_transform(values)
    return np.ascontiguousarray(scores, dtype=np.float32)


@dataclass(kw_only=True)
class Components:
    """Principal components of the expression, which k-means and leiden work on; positions are not used."""

    components: int = 30
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

    def embed(
        self,
        expression: NDArray[np.float32],
        xy: NDArray[np.float64],
        section: NDArray[np.intp],
        *,
        random_state: int,
        device: str = "",
        progress: bool = True,
    ) -> NDArray[np.float32]:
        """Scores (n, components)."""
        return components(expression, self.components, random_state)

    def links(self, xy: NDArray[np.float64], section: NDArray[np.intp]) -> NDArray[np.int64]:
        """No pairs: every spot counts for itself."""
        return np.empty((0, 2), dtype=np.int64)
