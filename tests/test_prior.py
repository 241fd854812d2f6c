"""Priors from elsewhere: what training spots make of them, and every way to pass one."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sthisto import pp, tl
from sthisto.datasets import synthetic, synthetic_truth
from sthisto.models import MODELS, Section, WithPrior, build, restore
from sthisto.models._prior import PriorRegression, slopes

RNG = np.random.default_rng(0)
N, GENES = 120, 30


def tissue(n=N, noise=1.0):
    """Spots whose expression has three factors that no image feature shows, and the truth."""
    random = np.random.default_rng(1)
    xy = random.uniform(0, 12, (n, 2))
    factors = random.normal(size=(n, 3))
    truth = 3 + factors @ random.normal(size=(3, GENES)) * 0.5
    features = random.normal(size=(n, 4)).astype(np.float32)
    expression = (truth + noise * random.normal(size=truth.shape)).astype(np.float32)
    return Section(name="a", xy=xy, features=features, expression=expression), truth.astype(np.float32)


def with_prior(section, prior):
    return Section(**{**vars(section), "prior": prior})


def error(model, prior, section, truth, train):
    """Mean squared error on the spots that were not fitted on."""
    spots = with_prior(section, prior)
    model.fit([spots.keep(np.flatnonzero(train))])
    points = Section(**{**vars(spots.keep(np.flatnonzero(~train))), "expression": None})
    return float(((model.predict(points) - truth[~train]) ** 2).mean())


@pytest.fixture(scope="module")
def halves():
    return np.arange(N) % 2 == 0


@pytest.mark.parametrize("model", ["ridge", "gp", "attention", "idw"])
def test_a_prior_that_knows_what_features_do_not_is_used(model, halves):
    section, truth = tissue()
    alone = error(build(model), None, section, truth, halves)
    both = error(build(model, with_prior=True), 0.7 * truth - 5, section, truth, halves)  # another level and scale
    assert both < 0.6 * alone


@pytest.mark.parametrize("kind", ["noise", "spots", "inverted", "constant"])
@pytest.mark.parametrize("model", ["ridge", "attention"])
def test_a_prior_that_says_nothing_is_ignored(model, kind, halves):
    section, truth = tissue()
    useless = {
        "noise": RNG.normal(size=truth.shape).astype(np.float32),
        "spots": truth[RNG.permutation(N)],
        "inverted": 6 - truth,
        "constant": np.ones_like(truth),
    }
    alone = error(build(model), None, section, truth, halves)
    both = error(build(model, with_prior=True), useless[kind], section, truth, halves)
    assert both < 1.02 * alone


def test_slopes_follow_the_data_and_are_not_negative():
    predicted = RNG.normal(size=(200, 5))
    measured = predicted * 1.3 + RNG.normal(size=predicted.shape)
    assert_allclose(slopes(measured, predicted)[0], 1.3, atol=0.25)
    assert slopes(measured, predicted)[1] > 0.95
    assert_array_equal(slopes(-measured, predicted)[0], 0)
    assert slopes(RNG.normal(size=predicted.shape), predicted)[1] < 0.5


def test_slopes_of_different_factors_differ_where_there_is_evidence():
    predicted = RNG.normal(size=(500, 4))
    measured = predicted * [0.2, 1.0, 1.0, 2.0] + 0.3 * RNG.normal(size=predicted.shape)
    assert_allclose(slopes(measured, predicted)[0], [0.2, 1.0, 1.0, 2.0], atol=0.3)  # the nearest pixel of 4


def test_few_spots_share_one_slope_near_one():
    predicted = RNG.normal(size=(5, 3))
    fitted, useful = slopes(predicted + 0.1 * RNG.normal(size=predicted.shape), predicted)
    assert len(set(fitted)) == 1
    assert 0.5 < fitted[0] < 1.2
    assert useful > 0.8


def test_genes_that_the_prior_lacks_are_predicted_by_the_model(halves):
    section, truth = tissue()
    prior = truth.copy()
    prior[:, ::2] = np.nan
    spots = with_prior(section, prior).keep(np.flatnonzero(halves))
    assert_allclose(PriorRegression.fit([spots]).axes[::2], 0, atol=1e-12)
    model = build("ridge", with_prior=True)
    model.fit([spots])
    assert np.isfinite(model.predict(spots)).all()


def test_held_out_predictions_do_not_know_the_spot(halves):
    """With a prior of noise, a spot's own value must not come back as its held-out prediction."""
    section, _ = tissue()
    pure = Section(**{**vars(section), "expression": RNG.normal(3, 1, (N, GENES)).astype(np.float32)})
    (held_out,) = build("ridge", with_prior=True).fit([with_prior(pure, pure.expression[::-1].copy())])
    assert abs(np.corrcoef((held_out - 3).ravel(), (pure.expression - 3).ravel())[0, 1]) < 0.15


@pytest.mark.parametrize("model", ["ridge", "attention", "idw"])
def test_state_restores_the_same_bits(model):
    section, truth = tissue()
    spots = with_prior(section, truth)
    fitted = build(model, with_prior=True)
    fitted.fit([spots])
    again = restore(model, {}, fitted.state())
    assert isinstance(again, WithPrior)
    assert_array_equal(again.predict(spots), fitted.predict(spots))


def test_points_without_a_prior_are_refused():
    section, truth = tissue()
    model = build("ridge", with_prior=True)
    model.fit([with_prior(section, truth)])
    with pytest.raises(ValueError, match="pass prior="):
        model.predict(section)
    with pytest.raises(RuntimeError, match="not fitted yet"):
        build("ridge", with_prior=True).predict(section)


def test_sections_have_levels_of_their_own():
    section, truth = tissue()
    other = Section(**{**vars(section), "name": "b", "expression": section.expression + 2})
    model = build("ridge", with_prior=True)
    model.fit([with_prior(section, truth), with_prior(other, truth)])
    first, second = (model.predict(with_prior(each, truth)).mean() for each in (section, other))
    assert_allclose(second - first, 2, atol=0.05)


# --- AnnData ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Two serial sections, of which the first is fitted."""
    both = synthetic(n_sections=2)
    pp.extract_features(both, library_key="library")
    names = both.obs["library"].unique()
    parts = [both[both.obs["library"] == name].copy() for name in names]
    for name, part in zip(names, parts, strict=True):
        part.uns["spatial"] = {name: part.uns["spatial"][name]}
    tl.fit(parts[0], "gp")
    return parts


@pytest.fixture
def target(pair):
    return pair[1].copy()


def few(adata, n=12):
    return np.isin(np.arange(adata.n_obs), np.random.default_rng(0).permutation(adata.n_obs)[:n])


def accuracy(adata, rows):
    tl.predict(adata)
    measured = np.asarray(adata.X.todense())[rows]
    return np.nanmean(
        [np.corrcoef(a, b)[0, 1] for a, b in zip(measured.T, adata.layers["sthisto"][rows].T, strict=True)]
    )


def test_a_fitted_prior_helps_where_few_spots_are_measured(pair, target):
    target.obs["few"] = few(target, 20)
    rows = ~target.obs["few"].to_numpy()
    tl.fit(target, "gp", prior=pair[0], train_on="few")
    both = accuracy(target, rows)
    tl.fit(target, "gp", train_on="few")
    assert both > accuracy(target, rows) + 0.02


def test_a_fitted_prior_is_kept_with_the_fit_and_maps_the_points(pair, target, tmp_path):
    tl.fit(target, "ridge", prior=pair[0], train_on=few(target, 60))
    tl.predict(target)
    dense = tl.upsample(target, 1)
    measured = dense.obs["nearest_spot"].astype(str).to_numpy()
    assert_allclose(dense.X, target[measured].layers["sthisto"], rtol=1e-4, atol=1e-4)
    tl.save(target, tmp_path / "fit.safetensors")
    target.write_h5ad(tmp_path / "section.h5ad")
    again = ad.read_h5ad(tmp_path / "section.h5ad")
    del again.uns["sthisto"]["fit"]
    tl.load(tmp_path / "fit.safetensors", again)
    tl.predict(again)
    assert_array_equal(again.layers["sthisto"], target.layers["sthisto"])
    assert tl.upsample(target, 2, match_spot_means=True).n_obs > 3 * target.n_obs


def as_prior(adata, form):
    """The same prior in every form that one can be passed in, of half of the genes."""
    genes = adata.var_names[:30]

    def truth(xy):
        return synthetic_truth(adata, xy, next(iter(adata.uns["spatial"])))

    def at(xy):
        return pd.DataFrame(truth(xy)[:, :30], columns=genes) if form != "array" else truth(xy)

    xy = adata.obsm["spatial"]
    if form in ("callable", "array"):
        return at
    if form == "mapping":
        return {next(iter(adata.uns["spatial"])): at}
    if form == "points":
        return ad.AnnData(at(xy).set_index(adata.obs_names), obsm={"spatial": xy})
    if form == "obsm":
        adata.obsm["other"] = at(xy).set_index(adata.obs_names)
    else:
        adata.layers["other"] = np.full(adata.shape, np.nan, dtype=np.float32)
        adata.layers["other"][:, :30] = at(xy)
    return "other"


def test_raster(target):
    xr = pytest.importorskip("xarray")
    y, x = (np.arange(0, target.obsm["spatial"][:, i].max() + 20, 4.0) for i in (1, 0))
    places = np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)
    values = synthetic_truth(target, places, next(iter(target.uns["spatial"])))[:, :30].T.reshape(30, len(y), len(x))
    raster = xr.DataArray(values, dims=("c", "y", "x"), coords={"c": target.var_names[:30], "y": y, "x": x})
    tl.fit(target, "ridge", prior=raster)
    tl.predict(target, prior=raster)
    tl.fit(target, "ridge", prior=as_prior(target, "obsm"), key_added="other")
    tl.predict(target, key="other")
    assert_allclose(target.layers["sthisto"], target.layers["other"], atol=0.3)  # the nearest pixel of 4
    assert tl.upsample(target, 2, prior=raster).n_vars == target.n_vars


@pytest.mark.parametrize("form", ["layer", "obsm", "callable", "array", "points", "mapping"])
def test_every_form_of_a_prior(target, form):
    prior = as_prior(target, form)
    tl.fit(target, "ridge", prior=prior, train_on=few(target, 60))
    recorded = form in ("layer", "obsm")
    if not recorded:
        with pytest.raises(ValueError, match="was not kept"):
            tl.predict(target)
    tl.predict(target, prior=None if recorded else prior)
    assert np.isfinite(target.layers["sthisto"]).all()
    with pytest.raises(ValueError, match="Pass prior="):
        tl.upsample(target, 2)
    points = as_prior(target, "callable")
    assert np.isfinite(tl.upsample(target, 2, prior=points).X).all()


@pytest.mark.parametrize(
    ("prior", "wrong", "match"),
    [
        ("nowhere", KeyError, "no layer or obsm 'nowhere'"),
        (3.5, TypeError, "expected a layer or key of obsm"),
        ("X_histo", ValueError, "names no genes"),
        (lambda xy: np.ones((3, 2)), ValueError, "shape"),
        (lambda xy: pd.DataFrame({"ENSG1": np.ones(len(xy))}), ValueError, "none of the 60 genes"),
        (lambda xy: pd.DataFrame(np.where(xy[:, :1] > 99, np.nan, 1.0), columns=["gene_0"]), ValueError, "gene|NaN"),
        ({"elsewhere": len}, KeyError, "no section"),
    ],
)
def test_priors_that_are_none_are_refused(target, prior, wrong, match):
    before = set(target.uns), set(target.layers)
    with pytest.raises(wrong, match=match):
        tl.fit(target, "ridge", prior=prior)
    assert (set(target.uns), set(target.layers)) == before


def test_points_of_another_scale_and_fits_that_read_no_image_are_refused(pair, target):
    away = as_prior(target, "points")
    away.obsm["spatial"] = away.obsm["spatial"] + 5000
    with pytest.raises(ValueError, match="full-resolution pixels"):
        tl.fit(target, "ridge", prior=away)
    measured = pair[0].copy()
    tl.fit(measured, "idw")
    with pytest.raises(ValueError, match="does not predict from image features"):
        tl.fit(target, "ridge", prior=measured)
    tl.fit(target, "ridge")
    with pytest.raises(ValueError, match="fitted without one"):
        tl.predict(target, prior="anything")


def test_gene_test_and_evaluate_fit_the_prior_again(pair, target):
    tl.fit(target, "ridge", prior=pair[0])
    tl.test_genes(target)
    assert target.var["sthisto_pearson"].notna().any()
    table = tl.evaluate(target, "ridge", split="random", n_repeats=1, counts_layer="counts", prior=pair[0])
    r = table.query("gene.isna() and metric == 'pearson'").set_index("model")["value"]
    assert {"prior", "ridge", "ridge + prior", "gene mean", "ceiling"} == set(r.index)
    assert r["ridge + prior"] > r["ridge"] - 0.01
    assert r["ridge + prior"] > r["prior"] - 0.01


def test_networks_take_a_prior_and_a_device(target):
    settings = {"epochs": 2, "device": "cpu"}
    tl.fit(target, "histosge", prior=as_prior(target, "obsm"), params=settings)
    assert "device" not in target.uns["sthisto"]["fit"]["sthisto"]["params"]
    tl.predict(target)
    assert np.isfinite(target.layers["sthisto"]).all()
    with pytest.raises(TypeError, match="device"):
        tl.fit(target, "ridge", params={"device": 3})


def test_every_model_can_be_built_with_a_prior():
    assert all(isinstance(build(name, with_prior=True), WithPrior) for name in MODELS)
