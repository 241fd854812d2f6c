"""Cross-fitting: hold out spots at random, in blocks or in folds, fit on the others, and predict those held out.

Calibration, the gene test and :mod:`sthisto.evaluation` use the same steps, so that held out means the same everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sthisto import grids
from sthisto.models import Model, Section, build

Mask: TypeAlias = NDArray[np.bool_]
Means: TypeAlias = NDArray[np.float32]
Refit: TypeAlias = Callable[[Sequence[Section]], Model]


def refit_of(model: str, params: Mapping[str, Any], *, random_state: int, device: str = "") -> Refit:
    """How to fit another model of this name and settings on a part of the sections."""

    def refit(sections: Sequence[Section]) -> Model:
        other = build(model, params, with_prior=any(each.prior is not None for each in sections))
        other.fit(sections, random_state=random_state, device=device, progress=False)
        return other

    return refit


def training_spots(sections: Sequence[Section], held_out: Sequence[Mask]) -> list[Section]:
    """The spots of each section that a mask (n,) does not hold out."""
    return [each.keep(np.flatnonzero(~mask)) for each, mask in zip(sections, held_out, strict=True)]


def points_of(sections: Sequence[Section], masks: Sequence[Mask]) -> list[Section]:
    """The spots of each section in a mask (n,), without their expression."""
    return [replace(s, expression=None).keep(np.flatnonzero(mask)) for s, mask in zip(sections, masks, strict=True)]


def predict(model: Model, points: Sequence[Section]) -> list[Means]:
    """Non-negative predictions (m, g) of each section; None are asked for where a section has no points."""
    return [np.maximum(model.predict(each), 0) if len(each) else np.empty((0, 0), np.float32) for each in points]


def predict_folds(sections: Sequence[Section], folds: Sequence[NDArray[np.int64]], refit: Refit) -> list[Means]:
    """Predictions (n, g) of each section, every spot by a fit without its fold (n,)."""
    predicted: list[Means | None] = [None] * len(sections)
    for number in range(1 + max(fold.max() for fold in folds)):
        masks = [fold == number for fold in folds]
        parts = predict(refit(training_spots(sections, masks)), points_of(sections, masks))
        for i, (mask, part) in enumerate(zip(masks, parts, strict=True)):
            whole = predicted[i]
            if mask.any():
                whole = np.empty((len(mask), part.shape[1]), np.float32) if whole is None else whole
                whole[mask] = part
            predicted[i] = whole
    return [each for each in predicted if each is not None]


def hold_out_blocks(section: Section, fraction: float, block: float, random_state: int) -> Mask:
    """Mask (n,) of whole blocks with sides of ``block`` pitches; empty where one block is larger than the section."""
    if (np.ptp(section.xy, axis=0) < block).all():
        return np.zeros(len(section), dtype=bool)
    return grids.hold_out(section.xy, fraction, block=block, random_state=random_state)


def block_folds(
    sections: Sequence[Section], n_folds: int, block: float, *, random_state: int, min_spots: int
) -> list[NDArray[np.int64]]:
    """Fold (n,) of the spots of each section: whole blocks, large ones first, dealt out in turn.

    Raises ValueError where a section is a single block, or a fold leaves fewer spots than ``min_spots``.
    """
    random, folds = np.random.default_rng(random_state), []
    for section in sections:
        member, size = grids.blocks(section.xy, block, offset=random.uniform(0, block, 2))
        if len(size) < 2:
            raise ValueError(
                f"section {section.name!r} with {len(section)} spots lies in one block of {block:g} pitches: too small "
                "to hold out blocks of it, so its genes cannot be tested."
            )
        fold = np.empty(len(size), dtype=np.int64)
        fold[np.argsort(-size - random.uniform(size=len(size)))] = np.arange(len(size)) % n_folds
        folds.append(fold[member])
    left = [[int((fold != each).sum()) for fold in folds] for each in range(1 + max(fold.max() for fold in folds))]
    if min(map(sum, left)) < min_spots or min(map(min, left)) < 2:
        raise ValueError(
            f"too few spots to test genes: a fold leaves {min(map(sum, left))}, and {min_spots} are needed."
        )
    return folds
