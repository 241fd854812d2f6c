"""Features of other tools: their tables are read, and put to the spots whose patches they are."""

from types import SimpleNamespace

import anndata
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
from shapely import box

from sthisto import pp, tl
from sthisto.encoders import read_features

SIDE = 64.0
CORNERS = np.stack(np.meshgrid(np.arange(0, 640, SIDE), np.arange(0, 512, SIDE)), axis=-1).reshape(-1, 2)
VALUES = np.random.default_rng(0).normal(size=(len(CORNERS), 5)).astype(np.float32)


def trident(path, *, corners=CORNERS, values=VALUES, attributes=None):
    with h5py.File(path, "w") as file:
        file["features"] = values
        file["coords"] = corners.astype(int)
        file["coords"].attrs.update({"patch_size_level0": int(SIDE)} if attributes is None else attributes)
    return path


def wsidata(**tables):
    """What is used of a WSIData: tables of features, and shapes of tiles, here in another order."""
    order = np.random.default_rng(1).permutation(len(CORNERS))
    shapes = gpd.GeoDataFrame({"tile_id": order}, geometry=[box(x, y, x + SIDE, y + SIDE) for x, y in CORNERS[order]])
    obs = pd.DataFrame({"tile_id": np.arange(len(CORNERS)), "library_id": "tiles"}).set_index(
        np.arange(len(CORNERS)).astype(str)
    )
    made = {name: anndata.AnnData(values, obs.copy()) for name, values in tables.items()}
    return SimpleNamespace(tables=made, shapes={"tiles": shapes})


@pytest.mark.parametrize("tool", ["trident", "clam", "batch of one", "wsidata"])
def test_every_point_gets_its_patch(tmp_path, tool):
    source = {
        "trident": lambda: trident(tmp_path / "a.h5"),
        "clam": lambda: str(trident(tmp_path / "a.h5", attributes={"patch_size": 32, "downsample": (2.0, 2.0)})),
        "batch of one": lambda: trident(tmp_path / "a.h5", values=VALUES[None]),
        "wsidata": lambda: wsidata(uni_tiles=VALUES),
    }[tool]()
    rows = np.random.default_rng(2).integers(0, len(CORNERS), 40)
    xy = CORNERS[rows] + np.random.default_rng(3).uniform(1, SIDE - 1, (40, 2))
    np.testing.assert_array_equal(read_features(source, xy), VALUES[rows])


def test_tables_of_another_scale_or_slide_are_refused(tmp_path):
    path = trident(tmp_path / "a.h5")
    xy = CORNERS + SIDE / 2
    with pytest.raises(ValueError, match=r"\d+ of 80 points are more than 32 px .* span x 32 to 608.*points span x 64"):
        read_features(path, xy * 2)
    with pytest.raises(ValueError, match="1 of 1 points are more than 5 px"):
        read_features(path, [[10.0, 10.0]], max_distance=5)


def test_what_is_wrong_with_a_table_is_named(tmp_path):
    xy = CORNERS + SIDE / 2
    with pytest.raises(FileNotFoundError, match="no file of features at"):
        read_features(tmp_path / "missing.h5", xy)
    with pytest.raises(ValueError, match=r"size of a patch is unknown.*found: level"):
        read_features(trident(tmp_path / "b.h5", attributes={"level": 0}), xy)
    with pytest.raises(ValueError, match="79 rows of features for 80 patches"):
        read_features(trident(tmp_path / "c.h5", values=VALUES[1:]), xy)
    values = VALUES.copy()
    values[:2, 0] = np.nan
    path = trident(tmp_path / "d.h5", values=values)
    with pytest.raises(ValueError, match="2 of 80 rows are not finite"):
        read_features(path, xy)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["embeddings"] = VALUES
    with pytest.raises(KeyError, match=r"has no coords and no features \(found: embeddings\)"):
        read_features(tmp_path / "e.h5", xy)
    with pytest.raises(KeyError, match="tables of features are 'uni_tiles', 'conch_tiles'; name one"):
        read_features(wsidata(uni_tiles=VALUES, conch_tiles=VALUES), xy)
    with pytest.raises(TypeError, match="or from a WSIData; found list"):
        read_features([VALUES], xy)


def test_imported_features_are_fitted_from(tmp_path, section):
    xy = section.obsm["spatial"]
    path = trident(tmp_path / "a.h5", corners=np.floor(xy) - 32, values=np.random.default_rng(0).normal(size=(100, 5)))
    pp.import_features(section, path, key_added="X_trident")
    assert section.obsm["X_trident"].shape == (100, 5)
    tl.fit(section, "ridge", features_key="X_trident")


def test_sections_have_a_source_each(tmp_path, sections):
    names = list(sections.obs["library"].unique())
    sources = {}
    for number, name in enumerate(names):
        xy = sections.obsm["spatial"][sections.obs["library"] == name]
        sources[name] = trident(
            tmp_path / f"{name}.h5", corners=np.floor(xy) - 32, values=np.full((len(xy), 3), number, float)
        )
    pp.import_features(sections, sources, library_key="library", key_added="X_own")
    for number, name in enumerate(names):
        assert (sections.obsm["X_own"][sections.obs["library"] == name] == number).all()
    with pytest.raises(KeyError, match="one source for each of the sections"):
        pp.import_features(sections, sources[names[0]], library_key="library")
