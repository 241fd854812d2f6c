"""Image features and how they were made: a record that concatenation, subsetting and files keep."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto._data._images import small_image, write_images
from sthisto._data._section import HEAVY, FeatureMetadata, SectionData, SectionImage
from sthisto._data._store import COORDINATES, features, records, write, write_record
from sthisto._messages import listed, warn

FORMER = "spatial_before_align"  # in obsm
MOVED = "moved"  # in the record of features: sections whose spots were moved afterwards


def read_metadata(adata: AnnData, key: str, section: SectionData, *, alone: bool) -> FeatureMetadata | None:
    """How a section's features were made; None for features from elsewhere.

    ``alone``: there is one section only, which may have had another name then.

    Raises
    ------
    ValueError
        Spots of one section whose features were made in different ways.
    """
    stored = records(adata, "features").get(key, {})
    weights = {part: stored[part] for part in HEAVY if part in stored}
    if f"{key}_settings" in adata.obs:
        texts = adata.obs[f"{key}_settings"].iloc[section.rows]
        kinds = [str(text) for text in pd.unique(texts.dropna())]
        if len(kinds) > 1:
            raise ValueError(
                f"the features of section {section.name!r} were made in {len(kinds)} different ways: several sections "
                "in one? Pass library_key= with the obs column that names the section of each spot, or extract again."
            )
        if kinds and not texts.isna().any():
            record = json.loads(kinds[0])
            return FeatureMetadata(**{**record, "encoder": {**record["encoder"], **weights}})
    return _from_uns(stored, section.name, alone=alone)


def _from_uns(stored: Mapping[str, Any], name: str, *, alone: bool) -> FeatureMetadata | None:
    names = [str(section) for section in stored.get("sections", ())]
    if name not in names and not (alone and len(names) == 1):
        return None
    at = names.index(name) if name in names else 0
    window = float(stored["window_um"]) if stored.get("dense", False) else None
    return FeatureMetadata(
        stored, float(stored["patch_um"]), float(stored["mpp"][at]), str(stored["image"][at]), window
    )


def with_features(adata: AnnData, sections: Mapping[str, SectionData], key: str) -> dict[str, SectionData]:
    """Sections with their image features and how these were made; refuses features that do not compare.

    Raises
    ------
    KeyError
        No features of that name.
    ValueError
        Sections described by different encoders or settings; values that were changed after extraction.
    """
    _refuse_moved(adata, sections, key)
    with_metadata = add_metadata(adata, sections, key)
    read = {name: replace(each, features=features(adata, key, each.rows)) for name, each in with_metadata.items()}
    described = {name: each.metadata for name, each in read.items() if each.metadata is not None}
    settings = {name: metadata.settings() for name, metadata in described.items()}
    if described and len(described) < len(read):
        _warn_lost(key, [name for name in read if name not in described])
    first = next(iter(settings), "")
    for name, own in settings.items():
        differs = differences(settings[first], own)
        if differs:
            raise ValueError(
                f"obsm[{key!r}] of sections {first!r} and {name!r} were made differently ({differs}). Extract the "
                "features of all sections with one encoder and one patch size."
            )
    refuse_changed(adata, key)
    return read


def add_metadata(adata: AnnData, sections: Mapping[str, SectionData], key: str) -> dict[str, SectionData]:
    """Sections with how their features were made, where that is recorded."""
    alone = len(sections) == 1
    return {
        name: replace(each, metadata=read_metadata(adata, key, each, alone=alone)) for name, each in sections.items()
    }


def need_metadata(section: SectionData, key: str) -> FeatureMetadata:
    """How a section's features were made, to make more of the same kind."""
    if section.metadata is None:
        raise KeyError(
            f"adata.obsm[{key!r}] of section {section.name!r} has no record of sthisto.pp.extract_features (features "
            "from elsewhere, or a concatenation that dropped it: pass uns_merge='unique'), so the features of new "
            "points cannot be made in the same way: pass features= (m, d), or extract the features again."
        )
    return section.metadata


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Settings that differ, with both values; "" where they agree."""
    keys = [key for key in one if key in other and one[key] != other[key]]
    return ", ".join(f"{key} {one[key]!r} and {other[key]!r}" for key in keys)


def compare_settings(fitted: str, section: SectionData) -> None:
    """Refuse features of another encoder than those of the fit; warn of another patch size.

    ``fitted`` is the JSON of the settings that the fit recorded, "" where it recorded none.
    """
    if not fitted or section.metadata is None:
        return
    ours, theirs = section.metadata.settings(), json.loads(fitted)
    differs = differences(theirs, ours)
    if differs:
        raise ValueError(
            f"the features of section {section.name!r} were not made as those of the fit were (fit, section: "
            f"{differs}). Describe both with the same encoder and patch size: "
            f"sthisto.pp.extract_features(adata, {theirs['encoder']!r}, patch_um={theirs['patch_um']:g})."
        )


def write_features(
    adata: AnnData,
    key: str,
    values: NDArray[np.float32],
    record: Mapping[str, Any],
    sections: Sequence[SectionData],
) -> None:
    """Put features into ``obsm``, how they were made into ``obs`` and ``uns``, and small images where none are."""
    images = {each.name: small_image(adata, each, _image_of(each)) for each in sections}
    settings = np.empty(adata.n_obs, dtype=object)
    for each in sections:
        settings[each.rows] = need_metadata(each, key).text()
    columns = {f"{key}_settings": pd.Categorical(settings), f"{key}_checksum": row_checksums(values)}
    write(adata, obsm={key: values}, obs=columns)
    write_images(adata, images)
    per_section = {
        "sections": np.array([each.name for each in sections], dtype=str),
        "mpp": np.array([_image_of(each).mpp for each in sections]),
        "image": np.array([_image_of(each).path for each in sections], dtype=str),
    }
    write_record(adata, "features", key, {**record, **per_section})


def _image_of(section: SectionData) -> SectionImage:
    if section.image is None:
        raise ValueError(f"the image of section {section.name!r} was not opened.")
    return section.image


def row_checksums(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Checksum (n,) of each row's float32 bytes."""
    rows = np.ascontiguousarray(values, dtype=np.float32)
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.int64)


def refuse_changed(adata: AnnData, key: str) -> None:
    """Refuse features that were changed after extraction."""
    if f"{key}_checksum" not in adata.obs:
        return
    recorded = adata.obs[f"{key}_checksum"].to_numpy()
    stored = adata.obsm[key]
    now = row_checksums(np.asarray(stored.todense() if hasattr(stored, "todense") else stored))
    changed = int((now != recorded).sum())
    if changed:
        raise ValueError(
            f"obsm[{key!r}] was changed in {changed} of {len(now)} rows after sthisto.pp.extract_features, so new "
            "points could not be described in the same way. Extract the features again (a fit scales them itself), or "
            f"keep changed ones under a name of their own: adata.obsm['X_mine'] = adata.obsm[{key!r}]."
        )


def write_aligned(adata: AnnData, xy: NDArray[np.float64], moved: Sequence[str], record: Mapping[str, Any]) -> None:
    """Replace the coordinates (n, 2), keep the former ones, and note for all features which sections have moved."""
    before = np.asarray(adata.obsm[COORDINATES])
    after = before.astype(np.float64)
    after[:, :2] = xy
    write(adata, obsm={FORMER: before.copy(), COORDINATES: after})
    for key, made in records(adata, "features").items():
        names = sorted({*map(str, made.get(MOVED, ())), *moved})
        write_record(adata, "features", key, {**made, MOVED: np.array(names, dtype=str)})
    write_record(adata, "alignment", COORDINATES, record)


def _refuse_moved(adata: AnnData, sections: Mapping[str, SectionData], key: str) -> None:
    """Refuse features that were extracted before the spots were moved."""
    names = set(map(str, records(adata, "features").get(key, {}).get(MOVED, ()))) & set(sections)
    if names:
        raise ValueError(
            f"obsm[{key!r}] of section {listed(sorted(names))} was extracted before sthisto.pp.align moved the spots. "
            "Extract the features again: sthisto.pp.extract_features(adata)."
        )


def _warn_lost(key: str, names: Sequence[str]) -> None:
    warn(
        f"the record of obsm[{key!r}] is missing for section {listed(names)}, as after a concatenation that dropped "
        "it: whether its features compare with the others is unknown."
    )
