"""How the training went."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from sthisto.pl._axes import finish, root_of
from sthisto.pl._colors import CURVES


def history(
    adata: AnnData,
    key: str = "sthisto",
    *,
    ax: "Axes | None" = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw the loss over the epochs of training.

    Whether a model was trained long enough, or too long, is seen where the curve of the spots held back turns up.

    Parameters
    ----------
    adata
        What :func:`sthisto.tl.fit` was called on.
    key
        Its ``key_added``.
    ax
        Axes to draw into; by default a new figure.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure, or a list of the one axes, or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        Nothing was fitted under ``key``.
    ValueError
        The model does not iterate, so it has no history.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import numpy as np, sthisto
    >>> adata = sthisto.datasets.synthetic(50, n_genes=20)
    >>> adata.uns["sthisto"] = {"fit": {"sthisto": {"model": "mine", "history": {"train": np.array([3.0, 2.0, 1.5])}}}}
    >>> [ax] = sthisto.pl.history(adata, show=False)
    >>> ax.get_legend_handles_labels()[1]
    ['train']
    """
    fits = adata.uns.get("sthisto", {}).get("fit", {})
    if key not in fits:
        raise KeyError(
            f"no fitted model {key!r} (found: {sorted(fits)}): run sthisto.tl.fit(adata) first, or pass key=."
        )
    curves = fits[key]["history"]
    if not curves:
        raise ValueError(
            f"the model {fits[key]['model']!r} is fitted in one step, without epochs to draw. How well it "
            "predicts is drawn by sthisto.pl.evaluation(sthisto.tl.evaluate(adata, ...)), what it predicts by "
            "sthisto.pl.genes and sthisto.pl.uncertainty."
        )
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(5, 3.2), layout="constrained").add_subplot()
    for (name, curve), color in zip(curves.items(), cycle(CURVES), strict=False):
        ax.plot(np.arange(1, len(curve) + 1), curve, label=name, color=color, marker="." if len(curve) == 1 else "")
    ax.set(xlabel="epoch", ylabel="loss", title=str(fits[key]["model"]))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return finish(root_of(ax), [ax], show=show, save=save, return_fig=return_fig)
