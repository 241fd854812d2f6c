"""Laws of fit, predict, upsample, save and load, for every model; and what they refuse."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image as Pillow
from scipy import sparse

from sthisto import grids, images, metrics, pp, tl
from sthisto._messages import SthistoWarning
from sthisto.datasets import synthetic, synthetic_truth
from sthisto.models import MODELS

EVERY = [name for name, spec in MODELS.items() if "patches" not in spec.inputs]
UNSEEING = [name for name in EVERY if "features" not in MODELS[name].inputs]


def fit(adata, model="ridge", **options):
    params = {"epochs": 3} if MODELS[model].iterative else None
    tl.fit(adata, model, **{"params": params, **options})
    return adata


def predicted(adata, key="sthisto"):
    tl.predict(adata, key=key)
    return adata.layers[key], adata.layers[f"{key}_std"]


def upsample(adata, grid=2, **options):
    return tl.upsample(adata, grid, **options)


def with_blanks(adata, rows, value):
    """The same section with the expression of some rows replaced."""
    changed = adata.copy()
    changed.X = changed.X.toarray()
    changed.X[rows] = value
    return changed


@pytest.fixture(scope="module")
def fitted(_section):
    return fit(_section.copy(), "idw")


# --- laws of every model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", EVERY)
@pytest.mark.parametrize("form", ["h5ad", "zarr 2", "zarr 3"])
@pytest.mark.filterwarnings(
    "ignore:Writing zarr v2 data:UserWarning", "ignore:zarr v3 autosharding:UserWarning", "ignore:Consolidated metadata"
)
def test_files_keep_predictions_to_the_bit(section, tmp_path, model, form):
    before = predicted(fit(section, model))
    kind, _, version = form.partition(" ")
    with ad.settings.override(zarr_write_format=int(version or 2)):
        getattr(section, f"write_{kind}")(tmp_path / kind)
    again = getattr(ad, f"read_{kind}")(tmp_path / kind)
    del again.layers["sthisto"], again.layers["sthisto_std"]
    for found, expected in zip(predicted(again), before, strict=True):
        assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize("model", EVERY)
def test_saved_models_predict_the_same_bits(section, tmp_path, model):
    before = predicted(fit(section, model))
    tl.save(section, tmp_path / "fit.safetensors")
    stripped = section.copy()
    del stripped.uns["sthisto"]["fit"]
    tl.load(tmp_path / "fit.safetensors", stripped, key_added="loaded")
    for found, expected in zip(predicted(stripped, "loaded"), before, strict=True):
        assert_array_equal(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]


@pytest.mark.parametrize("model", EVERY)
def test_same_seed_same_fit(section, model):
    other = section.copy()
    kept = [fit(adata, model, random_state=5).uns["sthisto"]["fit"]["sthisto"] for adata in (section, other)]
    assert kept[0]["sha256"] == kept[1]["sha256"]
    assert_array_equal(kept[0]["state"], kept[1]["state"])


@pytest.mark.parametrize("model", EVERY)
def test_points_on_the_spots_get_what_predict_gives(section, encoder, model):
    mean, std = predicted(fit(section, model))
    dense = upsample(section, section.obsm["spatial"], encoder=encoder)
    assert_array_equal(dense.X, mean)
    assert_array_equal(dense.layers["std"], std)
    assert dense.obs["measured"].all()
    assert_array_equal(dense.obs["nearest_spot"], section.obs_names)


@pytest.mark.parametrize("model", EVERY)
def test_hidden_spots_are_never_seen(section, model):
    section.obs["seen"] = np.arange(section.n_obs) % 4 > 0
    hidden = ~section.obs["seen"].to_numpy()
    expected = predicted(fit(section, model, train_on="seen"))
    values = np.resize([[np.nan], [7.0], [-1.0]], (hidden.sum(), 1))
    changed = fit(with_blanks(section, hidden, values), model, train_on="seen")
    for found, before in zip(predicted(changed), expected, strict=True):
        assert_array_equal(found, before)
    shown = with_blanks(section, np.flatnonzero(~hidden)[:5], 7.0)
    assert not np.array_equal(predicted(fit(shown, model, train_on="seen"))[0], expected[0])


@pytest.mark.parametrize("model", EVERY)
def test_predictions_are_finite_and_not_negative(section, model):
    mean, std = predicted(fit(section, model, genes=section.var_names[:7]))
    assert mean.dtype == std.dtype == np.float32
    assert_array_equal(section.var["sthisto_modelled"], np.arange(20) < 7)
    assert np.isnan(mean[:, 7:]).all()
    assert np.isnan(std[:, 7:]).all()
    assert (mean[:, :7] >= 0).all()
    assert (std[:, :7] > 0).all()


@pytest.mark.parametrize("model", sorted(set(EVERY) - {"stage"}))  # 3 of its 2 000 epochs tell nothing of its spread
def test_nine_of_ten_hidden_measurements_lie_within_1_64_deviations(section, model):
    hidden = np.arange(section.n_obs) % 2 > 0
    mean, std = predicted(fit(section, model, train_on=~hidden))
    off = np.abs(section.X.toarray() - mean)[hidden]
    assert (off < 1.645 * std[hidden]).mean() == pytest.approx(0.9, abs=0.05)
    assert np.corrcoef(off.ravel(), std[hidden].ravel())[0, 1] > 0.1


@pytest.mark.parametrize("model", sorted(set(EVERY) - set(UNSEEING)))
def test_a_section_that_was_only_stained_is_predicted_as_one_never_seen(sections, encoder, model):
    """The answer is that of a fit on the other section alone, whichever way it is asked for."""
    train = (sections.obs["library"] == "synthetic_0").to_numpy()
    stained = with_blanks(sections, ~train, np.nan)
    fit(stained, model, library_key="library", train_on=train)
    mean, _ = predicted(stained)
    measured = fit(sections[train].copy(), model, library_key="library")
    other = tl.predict(sections[~train].copy(), reference=measured, library_key="library")
    assert_array_equal(other.X, mean[~train])
    dense = upsample(stained, 2, encoder=encoder)
    assert set(dense.obs["library"]) == {"synthetic_0", "synthetic_1"}
    assert set(dense.obs["library"][dense.obs["measured"]]) == {"synthetic_0"}


@pytest.mark.parametrize("model", UNSEEING)
def test_models_without_an_image_refuse_a_stained_section(sections, refuses, model):
    train = (sections.obs["library"] == "synthetic_0").to_numpy()
    fit(sections, model, library_key="library", train_on=train)
    with refuses(sections, ValueError, "use a model that reads the image"):
        tl.predict(sections)
    with refuses(sections, ValueError, "only stained"):
        tl.predict(sections[~train].copy(), reference=sections, library_key="library")


# --- what goes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["csr", "csc", "csr_array", "dense", "float64", "view", "backed", "backed csc", "layer"]
)
def test_any_kind_of_matrix_gives_the_same_bits(section, tmp_path, form):
    section.obs["seen"] = np.arange(section.n_obs) % 3 > 0
    options = {"genes": list(section.var_names[[7, 2, 11]]), "train_on": "seen"}
    expected = predicted(fit(section.copy(), **options))
    if form == "layer":
        section.layers["log"] = section.X.copy()
        section.X = section.layers["counts"].copy()
        options["layer"] = "log"
    elif form == "view":
        wider = ad.concat([section, section[:9]], index_unique="-", uns_merge="first")
        section = wider[: section.n_obs]
    elif form.startswith("backed"):
        section.X = section.X.tocsc() if "csc" in form else section.X
        section.write_h5ad(tmp_path / "section.h5ad")
        section = ad.read_h5ad(tmp_path / "section.h5ad", backed="r")
    else:
        make = {
            "csr": sparse.csr_matrix,
            "csc": sparse.csc_matrix,
            "csr_array": sparse.csr_array,
            "dense": lambda x: x.toarray(),
            "float64": lambda x: x.toarray().astype(np.float64),
        }
        section.X = make[form](section.X)
    for found, before in zip(predicted(fit(section, **options)), expected, strict=True):
        assert_array_equal(found, before)
    if section.isbacked:
        section.file.close()


def test_genes_are_those_asked_for_then_the_highly_variable_then_all(section):
    genes = lambda **options: list(fit(section, **options).uns["sthisto"]["fit"]["sthisto"]["genes"])  # noqa: E731
    assert genes() == list(section.var_names)
    section.var["highly_variable"] = section.var["kind"] == "region"
    assert genes() == list(section.var_names[section.var["highly_variable"]])
    assert genes(genes="fine_01") == ["fine_01"]
    assert genes(genes=["noise_04", "fine_01", "noise_04"]) == ["noise_04", "fine_01"]


def test_names_may_be_anything(sections, encoder, tmp_path):
    names = {"synthetic_0": "patient/α 1", "synthetic_1": "Schnitt ß"}
    library = sections.obs["library"].astype(str).map(names)
    sections.obs["library"] = pd.Categorical(library, [*names.values(), "not here"])
    sections.uns["spatial"] = {names[old]: entry for old, entry in sections.uns["spatial"].items()}
    pictures = {names[old]: sections.uns["spatial"][names[old]]["images"]["hires"] for old in names}
    del sections.uns["spatial"]
    with pytest.warns(UserWarning, match="would nest in files"):
        pp.extract_features(sections, encoder, image=pictures, library_key="library", mpp=2.0)
    assert list(sections.uns["spatial"]) == ["Schnitt ß"]
    sections.obs_names = [str(number) for number in range(sections.n_obs)]
    sections.var["score"] = np.where(np.arange(12) % 2, np.nan, 1.0)
    fit(sections, library_key="library")
    sections.write_h5ad(tmp_path / "sections.h5ad")
    again = ad.read_h5ad(tmp_path / "sections.h5ad")
    for found, expected in zip(predicted(again), predicted(sections), strict=True):
        assert_array_equal(found, expected)
    dense = upsample(again, 2, image=pictures, encoder=encoder)
    assert set(dense.obs["library"].cat.categories) == set(names.values())
    assert dense.obs_names.is_unique
    dense.write_h5ad(tmp_path / "dense.h5ad")
    assert_array_equal(ad.read_h5ad(tmp_path / "dense.h5ad").var["score"], sections.var["score"])


def test_integer_names_are_told_apart(section):
    section.obs.index = pd.Index(range(section.n_obs))
    dense = upsample(fit(section, "idw"), section.obsm["spatial"])
    assert dense.obs["measured"].all()
    assert list(dense.obs["nearest_spot"]) == [str(number) for number in range(section.n_obs)]


def test_params_come_back_as_they_were_given(section, tmp_path):
    params = {"alphas": (0.1, np.float64(1.0)), "n_components": np.int64(3)}
    fit(section, params=params)
    expected = predicted(section)[0].copy()
    section.write_h5ad(tmp_path / "a.h5ad")
    assert_array_equal(predicted(ad.read_h5ad(tmp_path / "a.h5ad"))[0], expected)


def test_several_fits_live_side_by_side(section):
    fit(section, key_added="one")
    fit(section, "idw", key_added="two")
    assert not np.array_equal(predicted(section, "one")[0], predicted(section, "two")[0])
    assert {"one", "one_std", "two", "two_std"} <= set(section.layers)


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["hexagonal", "square"])
@pytest.mark.parametrize("factor", [2, 3])
def test_upsample_refines_the_array(array, factor):
    section = synthetic(80, n_genes=10, array=array, rotation=17, random_state=3)
    section.obs["seen"] = np.arange(80) % 5 > 0
    dense = upsample(fit(section, "idw", train_on="seen"), factor)
    at_spot = grids.nearest(section.obsm["spatial"], dense.obsm["spatial"])[0][:, 0]
    assert_allclose(at_spot, 0, atol=1e-6)
    assert 0.9 * factor**2 < dense.n_obs / section.n_obs < 1.6 * factor**2  # the rim is half a pitch wide
    rows, columns = dense.obs["array_row"].to_numpy(), dense.obs["array_col"].to_numpy()
    assert rows.min() == columns.min() == 0
    assert not pd.DataFrame({"row": rows, "col": columns}).duplicated().any()
    assert dense.obs["measured"].sum() == section.obs["seen"].sum()
    distance, spot = grids.nearest(dense.obsm["spatial"], section.obsm["spatial"])
    near = dense.obs["nearest_spot"].astype(str).to_numpy()
    own = section.obsm["spatial"][section.obs_names.get_indexer(near)]
    assert_allclose(np.linalg.norm(dense.obsm["spatial"] - own, axis=1), distance[:, 0], atol=1e-6)
    assert spot.shape == (dense.n_obs, 1)
    pitch = grids.Lattice.fit(section.obsm["spatial"]).pitch
    diameter = dense.uns["spatial"]["synthetic_0"]["scalefactors"]["spot_diameter_fullres"]
    assert_allclose(diameter, pitch / factor)
    assert section.uns["spatial"]["synthetic_0"]["scalefactors"]["spot_diameter_fullres"] != diameter


def test_distances_are_micrometres(section, encoder):
    dense = upsample(fit(section), 2, encoder=encoder)
    distance = grids.nearest(dense.obsm["spatial"], section.obsm["spatial"])[0][:, 0]
    assert_allclose(dense.obs["distance_um"], distance * 2.0, rtol=1e-6)  # 2 um a pixel
    assert dense.uns["sthisto"]["features"]["X_histo"]["mpp"] == pytest.approx(2.0)


@pytest.mark.parametrize("model", EVERY)
def test_the_map_runs_through_the_predictions_at_the_spots(section, encoder, model):
    mean, std = predicted(fit(section, model))
    dense = upsample(section, 2, encoder=encoder)
    distance, row = grids.nearest(section.obsm["spatial"], dense.obsm["spatial"])
    assert distance.max() < 1e-6
    same = np.isclose(dense.X[row[:, 0]], mean, atol=1e-3).mean()  # a patch may move by a thousandth of a pixel
    assert same > 0.98
    assert_allclose(dense.layers["std"][row[:, 0]], std, atol=0.02)


def test_a_lattice_and_given_points(section):
    fit(section, "idw")
    lattice = grids.Lattice.square(20.0)
    dense = upsample(section, lattice)
    assert_allclose(np.remainder(dense.obsm["spatial"], 20.0), 0)
    near = upsample(section, lattice, max_distance=15.0)
    assert near.n_obs < dense.n_obs
    assert grids.within(near.obsm["spatial"], section.obsm["spatial"], 15.0).all()
    points = section.obsm["spatial"][:3] + 1.0
    given = upsample(section, points)
    assert_array_equal(given.obsm["spatial"], points)
    assert not given.obs["measured"].any()
    assert "array_row" not in given.obs
    assert upsample(section, points[:1]).n_obs == 1
    assert upsample(section, [*points, [1e5, 1e5]], max_distance=30.0).n_obs == 3


def test_sections_share_one_map_and_keep_to_themselves(sections, encoder):
    fit(sections, library_key="library")
    dense = upsample(sections, np.int64(2), encoder=encoder)
    for name in ("synthetic_0", "synthetic_1"):
        spots = sections.obs_names[sections.obs["library"] == name]
        part = dense[dense.obs["library"] == name]
        assert set(part.obs["nearest_spot"]) == set(spots)
        assert part.obs["measured"].sum() == 60
    assert isinstance(dense.obs["nearest_spot"].dtype, pd.CategoricalDtype)


def test_a_part_of_the_fitted_section_is_predicted_as_in_the_whole(section, encoder):
    mean = predicted(fit(section, "gp"))[0]
    left = section.obsm["spatial"][:, 0] < np.median(section.obsm["spatial"][:, 0])
    left &= np.arange(100) % 3 > 0  # gaps change what the array looks like
    part = section[left].copy()
    del part.layers["sthisto"]
    assert_allclose(predicted(part)[0], mean[left], rtol=1e-5, atol=1e-6)
    dense = upsample(part, part.obsm["spatial"], encoder=encoder)
    assert_allclose(dense.X, mean[left], rtol=1e-5, atol=1e-6)


def test_features_of_ones_own_need_no_image(section):
    fit(section)
    del section.uns["spatial"], section.uns["sthisto"]["features"]
    dense = upsample(section, section.obsm["spatial"], features=section.obsm["X_histo"])
    assert_array_equal(dense.X, predicted(section)[0])
    assert (dense.obs["distance_um"] == 0).all()  # the scale is known from obs


def test_a_section_may_be_named_after_it_was_fitted(section, encoder):
    fit(section)
    before = upsample(section, 2, encoder=encoder)
    section.uns["spatial"] = {"V10": section.uns["spatial"]["synthetic_0"]}
    dense = upsample(section, 2, encoder=encoder)
    assert_array_equal(dense.X, before.X)
    assert list(dense.uns["spatial"]) == ["V10"]


def test_the_map_does_not_share_memory_with_the_section(section):
    dense = upsample(fit(section, "idw"), 2)
    dense.uns["spatial"]["synthetic_0"]["images"]["hires"][:] = 0
    assert section.uns["spatial"]["synthetic_0"]["images"]["hires"].max() > 0


def test_points_beyond_the_rim_of_the_picture_are_described(encoder):
    section = synthetic(60, n_genes=10, random_state=4)
    xy = section.obsm["spatial"]
    low, high = (np.floor(xy.min(axis=0)) - 2).astype(int), (np.ceil(xy.max(axis=0)) + 2).astype(int)
    picture = section.uns.pop("spatial")["synthetic_0"]["images"]["hires"][low[1] : high[1], low[0] : high[0]]
    section.obsm["spatial"] = xy - low
    pp.extract_features(section, encoder, image=picture, mpp=2.0)
    dense = upsample(fit(section), 2, image=picture, encoder=encoder)
    assert (dense.obsm["spatial"] < 0).any()
    assert np.isfinite(dense.X).all()


def test_ridge_finds_what_the_picture_shows():
    section = synthetic(150, n_genes=20, random_state=5)
    pp.extract_features(section)
    fit(section)
    lattice = grids.Lattice.fit(section.obsm["spatial"]).refine(2)
    sites = lattice.cover(section.obsm["spatial"], 1.0 * lattice.pitch)
    points = lattice.points(sites[(sites % 2).any(axis=1)])[::4]
    dense, flat = upsample(section, points), section.X.mean(axis=0).A1
    truth = synthetic_truth(section, points)
    shown = section.var["kind"].isin(["region", "density"]).to_numpy()
    error = ((dense.X - truth) ** 2).mean(axis=0)[shown]
    assert error.mean() < 0.6 * ((flat - truth) ** 2).mean(axis=0)[shown].mean()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 400)), min_size=1, max_size=6), st.randoms())
def test_a_points_value_does_not_depend_on_the_others(fitted, points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    together = upsample(fitted, points).X
    assert_array_equal(upsample(fitted, [points[at] for at in order]).X, together[order])
    assert_array_equal(upsample(fitted, points[:1]).X, together[:1])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "20 NaN or infinite values in 1 training spots"),
        (np.inf, "20 NaN or infinite values in 1 training spots"),
        (-0.5, r"negative values \(lowest -0.5\), as after sc.pp.scale"),
    ],
)
def test_bad_expression(section, refuses, value, message):
    section.X = section.X.toarray()
    section.X[3] = value
    with refuses(section, ValueError, message):
        fit(section)


def test_raw_counts(section, refuses):
    message = (
        r"counts'\] seems to hold raw counts .* sc.pp.normalize_total\(adata, target_sum=1e4\); sc.pp.log1p\(adata\)"
    )
    with refuses(section, ValueError, message):
        fit(section, layer="counts")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "magic"}, KeyError, "no model 'magic' .there are: .*idw, .*ridge"),
        ({"params": {"epoch": 3}}, ValueError, "model 'ridge' has no params epoch .it has: n_components, alphas"),
        ({"params": {"alphas": object()}}, TypeError, "settings are numbers, strings, None or lists"),
        ({"key_added": "a/b"}, ValueError, "key_added='a/b': expected a non-empty name without '/'"),
        ({"key_added": ""}, ValueError, "expected a non-empty name"),
        ({"layer": "log"}, KeyError, "no layer 'log' in adata .found: 'counts'"),
        (
            {"genes": ["fine_01", "BRCA1"]},
            KeyError,
            "1 of 2 genes are not in adata.var_names: 'BRCA1' .there: 'region_00'",
        ),
        ({"genes": []}, ValueError, "genes= is empty"),
        ({"features_key": "X_uni"}, KeyError, "no image features 'X_uni' .* pass features_key="),
        ({"library_key": "slide"}, KeyError, "no column 'slide' in adata.obs .found: 'array_row'"),
        ({"train_on": "seen"}, KeyError, "no column 'seen' in adata.obs"),
        ({"train_on": "region"}, ValueError, r"obs\['region'\] is (object|str) with 0 missing values; expected True"),
        ({"train_on": np.arange(100)}, ValueError, r"train_on is int64 of shape \(100,\); expected .*boolean"),
        ({"train_on": np.ones(99, bool)}, ValueError, r"train_on is bool of shape \(99,\)"),
        ({"train_on": np.arange(100) < 12}, ValueError, "12 training spots; model 'ridge' needs at least 20"),
        ({"train_on": np.zeros(100, bool)}, ValueError, "0 training spots"),
    ],
)
def test_bad_settings(section, refuses, options, error, message):
    with refuses(section, error, message):
        tl.fit(section, **{"model": "ridge", **options})


def test_bad_columns(section, refuses):
    section.var["highly_variable"] = False
    with refuses(section, ValueError, r"no gene to model: var\['highly_variable'\] marks none"):
        fit(section)
    section.var["highly_variable"] = pd.Series([True] * 19 + [np.nan], dtype=object).to_numpy()
    with refuses(section, ValueError, r"var\['highly_variable'\] is object with 1 missing values"):
        fit(section)
    section.obs["seen"] = ["True"] * 100
    with refuses(section, ValueError, r"obs\['seen'\] is .* expected True or False"):
        fit(section, genes="fine_01", train_on="seen")


def test_columns_of_nullable_and_object_booleans(section):
    seen = np.arange(100) % 2 == 0
    expected = predicted(fit(section.copy(), train_on=seen))[0]
    for column in (pd.array(seen, dtype="boolean"), seen.astype(object)):
        section.obs["seen"] = column
        assert_array_equal(predicted(fit(section.copy(), train_on="seen"))[0], expected)


def test_bad_features(section, refuses):
    value = section.obsm["X_histo"][4, 2].copy()
    section.obsm["X_histo"][4, 2] = np.nan
    with refuses(section, ValueError, "NaN or infinite values in 1 of 100 rows. Extract the features again"):
        fit(section)
    section.obsm["X_histo"][4, 2] = value
    fit(section)
    section.obsm["X_histo"] = section.obsm["X_histo"][:, :5]
    with refuses(section, ValueError, "was changed in 100 of 100 rows after sthisto.pp.extract_features"):
        fit(section)
    del section.obs["X_histo_checksum"]
    fit(section, key_added="five")
    section.obsm["X_histo"] = np.zeros((100, 6), np.float32)
    with refuses(section, ValueError, "fitted on 5 features and section 'synthetic_0' has 6"):
        tl.predict(section, key="five")
    with refuses(section, ValueError, r"features= has shape \(7, 5\); expected \(100, d\)"):
        upsample(section, section.obsm["spatial"], key="five", features=np.zeros((7, 5), np.float32))


def test_never_fitted(section, refuses):
    with refuses(section, KeyError, r"no fitted model 'sthisto' .*found: nothing.*Run sthisto.tl.fit"):
        upsample(section)
    fit(section, key_added="mine")
    with refuses(section, KeyError, r"no fitted model 'sthisto' .*found: 'mine'"):
        tl.predict(section)
    with refuses(section, KeyError, "no fitted model"):
        tl.save(section, "nowhere.safetensors")


def test_state_of_other_genes(section, refuses):
    fit(section)
    fewer = section[:, 1:].copy()
    with refuses(fewer, ValueError, "fitted on other genes: 1 of its 20 are not in .*first: 'region_00'"):
        tl.predict(fewer)


def test_state_of_another_section(section, refuses):
    fit(section, "idw")
    other = synthetic(100, n_genes=20, random_state=9)
    other.uns["sthisto"] = section.uns["sthisto"]
    with refuses(other, ValueError, "have moved since the model was fitted|none of the spots"):
        upsample(other)
    other.obs_names = [f"spot {number}" for number in range(100)]
    with refuses(other, ValueError, "none of the spots of section 'synthetic_0' .* pass reference="):
        tl.predict(other)
    section.obsm["spatial"] *= 0.2
    with refuses(section, ValueError, "100 of 100 training spots .* have moved since"):
        tl.predict(section)


def test_bad_grids(section, sections, refuses, encoder):
    fit(section)
    for grid, message in [
        (0, "factor should be a whole number"),
        ([[1.0, np.nan]], r"grid of shape \(1, 2\): expected a whole number"),
        (np.zeros((3, 3)), r"grid of shape \(3, 3\)"),
        ([[1e6, 1e6]], "1 of 1 points are outside the image"),
    ]:
        with refuses(section, ValueError, message):
            upsample(section, grid, encoder=encoder)
    with refuses(section, ValueError, "no point of the grid is within max_distance=1"):
        upsample(section, [[1e6, 1e6]], max_distance=1, encoder=encoder)
    fit(sections, library_key="library")
    with refuses(sections, ValueError, "belong to one section, but adata has 2: pass one"):
        upsample(sections, [[1.0, 1.0]])


def test_scattered_spots_have_no_array_to_refine(refuses):
    section = synthetic(60, n_genes=10)
    section.obsm["spatial"] = np.random.default_rng(0).uniform(20, 400, (60, 2))
    fit(section, "idw")
    with refuses(section, ValueError, "no lattice"):
        upsample(section)
    assert upsample(section, grids.Lattice.square(30.0)).n_obs > 60


# --- the picture, again ----------------------------------------------------------------------------------------------


def test_an_array_has_to_be_passed_again(section, refuses, encoder):
    picture = section.uns["spatial"]["synthetic_0"]["images"]["hires"]
    pp.extract_features(section, encoder, image=picture, mpp=2.0)
    expected = predicted(fit(section))[0]
    with refuses(section, KeyError, "taken from an array, which is not kept: pass it again as image="):
        upsample(section, encoder=encoder)
    dense = upsample(section, section.obsm["spatial"], image=picture, encoder=encoder)
    assert_array_equal(dense.X, expected)
    opened = images.open_image(picture, mpp=2.0)
    assert_array_equal(upsample(section, section.obsm["spatial"], image=opened, encoder=encoder).X, expected)


def test_a_path_that_no_longer_leads_there(section, refuses, encoder, tmp_path, monkeypatch):
    Pillow.fromarray(section.uns["spatial"]["synthetic_0"]["images"]["hires"]).save(tmp_path / "section.png")
    monkeypatch.chdir(tmp_path)
    pp.extract_features(section, encoder, image="section.png", mpp=2.0)
    assert list(section.uns["sthisto"]["features"]["X_histo"]["image"]) == ["section.png"]
    expected = predicted(fit(section))[0]
    assert_array_equal(upsample(section, section.obsm["spatial"], encoder=encoder).X, expected)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = (
        "'synthetic_0' were taken from 'section.png', which is not there: pass it as image=.*count from .*elsewhere"
    )
    with refuses(section, FileNotFoundError, message):
        upsample(section, encoder=encoder)
    dense = upsample(section, section.obsm["spatial"], image=tmp_path / "section.png", encoder=encoder)
    assert_array_equal(dense.X, expected)


def test_a_picture_that_left_uns(section, refuses, encoder):
    fit(section)
    del section.uns["spatial"]
    with refuses(section, KeyError, "taken from 'uns:hires', which is not there: pass it as image="):
        upsample(section, encoder=encoder)


def test_features_from_elsewhere_cannot_be_made_alike(section, refuses):
    section.obsm["X_mine"] = section.obsm["X_histo"]
    fit(section, features_key="X_mine")
    with refuses(
        section, KeyError, "'X_mine'. of section .* has no record of sthisto.pp.extract_features.*pass features="
    ):
        upsample(section)


def test_an_encoder_of_ones_own_is_asked_for(section, refuses):
    fit(section)
    with refuses(section, KeyError, "encoder 'colors' was an object"):
        upsample(section)


# --- files -----------------------------------------------------------------------------------------------------------


def test_load_without_an_object_gives_a_reference(section, tmp_path):
    fit(section)
    tl.save(section, tmp_path / "fit")
    reference = tl.load(tmp_path / "fit")
    assert reference.shape == (0, 20)
    one = tl.predict(section, reference=reference)
    two = tl.predict(section, reference=section)
    assert_array_equal(one.X, two.X)
    assert_array_equal(one.layers["std"], two.layers["std"])
    assert list(one.obs_names) == list(section.obs_names)


@pytest.mark.parametrize("at", [0.001, 0.2, 0.5, 0.999])
def test_a_damaged_file_is_refused(section, refuses, tmp_path, at):
    fit(section)
    tl.save(section, tmp_path / "fit")
    whole = bytearray((tmp_path / "fit").read_bytes())
    whole[int(at * len(whole))] ^= 1
    (tmp_path / "fit").write_bytes(whole)
    with refuses(section, ValueError, "damaged|no whole model"):
        tl.load(tmp_path / "fit", section)
    (tmp_path / "fit").write_bytes(whole[: len(whole) // 2])
    with refuses(section, ValueError, "holds no whole model that sthisto.tl.save wrote"):
        tl.load(tmp_path / "fit", section)


def test_a_file_of_another_kind_is_refused(section, refuses, tmp_path):
    with refuses(section, FileNotFoundError, "nothing"):
        tl.load(tmp_path / "nothing", section)
    (tmp_path / "text").write_text("no model")
    with refuses(section, ValueError, "holds no whole model"):
        tl.load(tmp_path / "text", section)
    with refuses(section, ValueError, "without '/'"):
        tl.load(tmp_path / "text", section, key_added="a/b")


# --- a real section --------------------------------------------------------------------------------------------------


def test_her2st_from_picture_to_map(data):
    table, picture = data("her2st/C2.h5ad"), data("her2st/C2.jpg")
    section = ad.read_h5ad(table)
    sc.pp.normalize_total(section, target_sum=1e4)
    sc.pp.log1p(section)
    order = np.argsort(-np.asarray(section.X.mean(axis=0)).ravel())
    section.var["highly_variable"] = np.isin(np.arange(section.n_vars), order[:40])
    pp.extract_features(section, image=picture, pitch_um=200)
    dense = upsample(fit(section), 2)
    assert 3.5 < dense.n_obs / section.n_obs < 6.5
    assert dense.n_vars == 40
    pitch = grids.spacing(section.obsm["spatial"])
    assert grids.within(dense.obsm["spatial"], section.obsm["spatial"], pitch).all()
    small, scale = images.open_image(picture).thumbnail(500)
    x, y = (np.clip(dense.obsm["spatial"].T * scale, 0, np.array(small.shape[1::-1])[:, None] - 1)).astype(int)
    on_map, elsewhere = small[y, x].min(axis=1), small.min(axis=2)
    assert np.median(on_map) < np.median(elsewhere)  # tissue is darker than glass
    assert dense.uns["spatial"]["section"]["images"]["hires"].shape[0] <= 2000


def test_histosge_sees_the_colors_of_the_picture(section):
    """Its paper has an RGB map beside the features; other models read the features alone."""
    fit(section, "histosge", key_added="with")
    fit(section, "histosge", key_added="without", params={"epochs": 3, "rgb": False})
    expected, _ = predicted(section, "without")
    section.obsm["X_elsewhere"] = section.obsm["X_histo"]
    del section.uns["spatial"], section.uns["sthisto"]["features"]
    assert_array_equal(predicted(section, "without")[0], expected)
    with pytest.raises((KeyError, FileNotFoundError), match=r"picture|image"):
        predicted(section, "with")
    with pytest.raises(KeyError, match="Pass image="):
        fit(section, "histosge", features_key="X_elsewhere")


@pytest.fixture
def wide(section):
    """A section of 1 100 genes with counts, of which the second hundred varies most."""
    random = np.random.default_rng(0)
    rate = np.tile(random.uniform(1, 30, 1100), (section.n_obs, 1))
    rate[:, 100:200] *= random.gamma(0.5, 2.0, (section.n_obs, 100))
    adata = ad.AnnData(sparse.csr_matrix(random.poisson(rate).astype(np.float32)), obs=section.obs, obsm=section.obsm)
    adata.uns = section.uns
    adata.layers["counts"] = adata.X.copy()
    adata.X = metrics.lognorm(adata.X)
    return adata


@pytest.mark.parametrize("counted", [True, False])
def test_of_many_genes_the_most_variable_are_fitted_and_the_user_is_warned(wide, counted):
    if not counted:
        del wide.layers["counts"]
    with pytest.warns(SthistoWarning, match=r"the 1000 most variable of 1100 genes.*genes=adata.var_names"):
        tl.fit(wide, "idw")
    assert len(wide.uns["sthisto"]["fit"]["sthisto"]["genes"]) == 1000
    tl.fit(wide, "idw", genes=100)
    assert len(set(wide.uns["sthisto"]["fit"]["sthisto"]["genes"]) & set(wide.var_names[100:200])) > 90


def test_genes_are_chosen_on_the_training_spots_alone(wide):
    half = np.arange(wide.n_obs) % 2 == 0
    changed = wide.copy()
    changed.layers["counts"] = sparse.csr_matrix(np.where(half[:, None], wide.layers["counts"].toarray(), 0))
    for adata in (wide, changed):
        tl.fit(adata, "idw", genes=150, train_on=half)
    chosen, again = (adata.uns["sthisto"]["fit"]["sthisto"]["genes"] for adata in (wide, changed))
    assert_array_equal(chosen, again)


@pytest.mark.parametrize("genes", [0, -3, True, 2.5])
def test_a_number_of_genes_is_a_whole_number(section, genes, refuses):
    with refuses(section, ValueError, "expected names, or a whole number of 1 or more"):
        tl.fit(section, "idw", genes=genes)
