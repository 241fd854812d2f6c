"""What fit, predict and upsample say of how far to trust them."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sthisto import _data, grids, pl, tl
from sthisto.datasets import synthetic
from sthisto.models import MODELS, Section
from sthisto.tl import _uncertainty
from sthisto.uncertainty import HeldOutPredictions


def hidden_part(adata, side=0.5):
    """A corner of the section, as a mask."""
    xy = adata.obsm["spatial"]
    return (xy < xy.min(axis=0) + side * np.ptp(xy, axis=0)).all(axis=1)


@pytest.fixture(scope="module")
def _fitted(_section):
    """A section of which a corner was hidden, fitted."""
    adata = _section.copy()
    adata.obs["seen"] = ~hidden_part(adata)
    tl.fit(adata, train_on="seen")
    return adata


@pytest.fixture
def fitted(_fitted):
    return _fitted.copy()


def test_intervals_are_written_where_asked_for(fitted):
    tl.predict(fitted)
    assert set(fitted.layers) - {None} == {"counts", "sthisto", "sthisto_std"}  # None: X, since anndata 0.13
    tl.predict(fitted, interval=0.9)
    low, mean, high = (fitted.layers[f"sthisto{name}"] for name in ("_low", "", "_high"))
    assert low.dtype == high.dtype == np.float32
    assert ((low >= 0) & (low <= high)).all()
    assert (high > mean).mean() > 0.99
    held = (low <= fitted.X.toarray()) & (fitted.X.toarray() <= high)
    hidden = ~fitted.obs["seen"].to_numpy()
    assert held[~hidden].mean() > 0.88
    assert held[hidden].mean() > 0.75  # a whole corner, in part further off than any block that was held back
    wide = tl.predict(fitted[hidden].copy(), reference=fitted, interval=0.95)
    assert {"std", "low", "high"} == set(wide.layers) - {None}


def test_dense_points_on_the_spots_have_what_the_spots_have(fitted, encoder):
    tl.predict(fitted, interval=0.8)
    dense = tl.upsample(fitted, fitted.obsm["spatial"], encoder=encoder, interval=0.8)
    for name in ("std", "low", "high"):
        assert_array_equal(dense.layers[name], fitted.layers[f"sthisto_{name}"])
    assert_array_equal(dense.obs["extrapolated"], fitted.obs["sthisto_extrapolated"])
    assert set(tl.upsample(fitted, 2, encoder=encoder).layers) - {None} == {"std"}


def test_the_spread_grows_away_from_the_training_spots():
    """idw keeps nothing of a gene far away; synthetic patterns are smooth, so it knows much near by."""
    adata = synthetic(250, n_genes=20, random_state=3)
    adata.obs["seen"] = ~hidden_part(adata, 0.6)
    tl.fit(adata, "idw", train_on="seen")
    tl.predict(adata)
    hidden = ~adata.obs["seen"].to_numpy()
    trained = adata.obsm["spatial"][~hidden]
    distance = np.linalg.norm(adata.obsm["spatial"][:, None] - trained[None], axis=2).min(axis=1)
    distance /= np.median(distance[hidden & (distance > 0)])
    genes = [name for name in adata.var_names if name.startswith(("region", "gradient"))] or list(adata.var_names)
    at = adata.var_names.get_indexer(genes)
    ratio = adata.layers["sthisto_std"][:, at].mean(axis=1)
    assert ratio[distance > 1.2].mean() > ratio[distance == 0].mean()


def test_points_beyond_what_was_tested_are_extrapolated(fitted, encoder):
    away = fitted.obsm["spatial"].min(axis=0) + np.array([[0.0, 0.0], [10.0, 10.0]])
    features = np.repeat(fitted.obsm["X_histo"][fitted.obs["seen"]][:1], 2, axis=0)
    near = fitted.obsm["spatial"][fitted.obs["seen"]][:1]
    dense = tl.upsample(fitted, np.concatenate([near, away - 30 * 100]), features=features[[0, 0, 1]])
    assert dense.obs["extrapolated"].tolist() == [False, True, True]


def test_points_of_unusual_look_are_extrapolated(fitted):
    seen = fitted.obs["seen"].to_numpy()
    usual, near = fitted.obsm["X_histo"][seen][:1], fitted.obsm["spatial"][seen][:1]
    features = np.concatenate([usual, usual + 50 * fitted.obsm["X_histo"].std(axis=0)])
    dense = tl.upsample(fitted, np.concatenate([near, near + 1]), features=features)
    assert dense.obs["extrapolated"].tolist() == [False, True]


def test_in_a_section_that_was_only_stained_the_look_alone_counts(sections):
    one, two = (sections[sections.obs["library"] == name].copy() for name in sections.obs["library"].unique())
    tl.fit(one, "ridge", library_key="library")
    del two.obs["X_histo_checksum"]
    two.obsm["X_histo"][3] += 60 * two.obsm["X_histo"].std(axis=0)
    stained = tl.predict(two, reference=one, library_key="library")
    assert stained.obs["extrapolated"].iloc[3]
    assert stained.obs["extrapolated"].mean() < 0.3


def test_models_that_read_no_features_have_no_look(section):
    del section.obsm["X_histo"]
    tl.fit(section, "idw")
    tl.predict(section)
    assert not section.obs["sthisto_extrapolated"].any()
    assert not any(name.startswith("novelty") for name in _uncertainty.UncertaintyModel.restore(_read(section)).state())


def _read(adata):
    return _data.read_fit(adata, "sthisto")


@pytest.mark.parametrize("model", ["idw", "histosge"])
def test_networks_are_not_trained_twice(section, monkeypatch, model):
    fits = []
    kind = MODELS[model].load()
    once = kind.fit
    monkeypatch.setattr(kind, "fit", lambda self, *given, **named: (fits.append(1), once(self, *given, **named))[1])
    tl.fit(section, model, params={"epochs": 2} if MODELS[model].iterative else None)
    assert len(fits) == (1 if MODELS[model].iterative else 2)


def test_blocks_are_predicted_by_a_fit_that_has_not_seen_them():
    random = np.random.default_rng(0)
    section = Section(
        name="a", xy=random.uniform(0, 40, (1600, 2)), expression=random.uniform(1, 2, (1600, 3)).astype(np.float32)
    )
    handed = []

    class Recorder:
        def predict(self, points):
            assert points.expression is None
            self.points = points
            return section.expression[grids.nearest(points.xy, section.xy)[1][:, 0]] + 1

    recorder = Recorder()
    held_out = _uncertainty._hold_out_blocks(
        [section], lambda parts: (handed.extend(parts), recorder)[1], 20, 0, with_features=False
    )
    [training] = handed
    assert len(training) + len(recorder.points) == _uncertainty.MAX_SPOTS  # a bounded part of a large section
    assert not set(map(tuple, training.xy)) & set(map(tuple, recorder.points.xy))
    assert isinstance(held_out, HeldOutPredictions)
    assert_allclose(held_out.predicted - held_out.measured, 1, rtol=1e-6)
    nearest = np.linalg.norm(recorder.points.xy[:, None] - training.xy[None], axis=2).min(axis=1)
    assert_allclose(held_out.covariates.distance, nearest)
    assert held_out.covariates.distance.max() > 1.5  # pitches: whole blocks, not spots among their neighbors


def test_sections_too_small_for_a_block_learn_nothing_of_distance():
    xy = np.random.default_rng(0).uniform(0, 3, (30, 2))
    tiny = Section(name="a", xy=xy, expression=np.ones((30, 2), np.float32))
    assert (
        _uncertainty._hold_out_blocks([tiny], lambda parts: pytest.fail("no block to hide"), 20, 0, with_features=False)
        is None
    )


def test_a_fit_of_an_earlier_version_is_refused(fitted, refuses):
    record = _read(fitted)
    for name in [name for name in record.arrays if name.startswith(("calibration", "inflation", "distribution"))]:
        del record.arrays[name]
    _data.write_fit(fitted, "old", record)
    with refuses(fitted, ValueError, "fitted by an earlier sthisto, without calibrated uncertainty. Fit again"):
        tl.predict(fitted, key="old")


@pytest.mark.parametrize("interval", [0, 1.5, 90])
def test_intervals_that_are_no_probability(fitted, refuses, interval):
    with refuses(fitted, ValueError, f"interval={interval}: expected a probability"):
        tl.predict(fitted, interval=interval)
    with refuses(fitted, ValueError, f"interval={interval}: expected a probability"):
        tl.upsample(fitted, interval=interval)


def test_extrapolated_spots_are_hatched(fitted):
    tl.predict(fitted)
    fitted.obs["sthisto_extrapolated"] = np.arange(fitted.n_obs) < 9
    [ax] = pl.uncertainty(fitted, fitted.var_names[0], show=False)
    assert "hatched: outside the training domain" in ax.get_xlabel()
    del fitted.obs["sthisto_extrapolated"]
    [ax] = pl.uncertainty(fitted, fitted.var_names[0], show=False)
    assert "hatched" not in ax.get_xlabel()
