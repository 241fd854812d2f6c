"""The laws of every model in the registry, on sections of a few dozen spots."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load, save
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sthisto import models, pp, tl
from sthisto.datasets import synthetic
from sthisto.models import MODELS, FeatureStatistics, Section
from sthisto.models.baselines import stnet as pixels

SIZE = 28
SEQUENCE = {
    "input_size": SIZE,
    "depth": 2,
    "heads": 2,
    "head_width": 8,
    "mlp": 16,
    "dropout": 0.0,
    "learning_rate": 3e-3,
}
QUICK = {
    "stnet": {"backbone": "tiny", "weights": "imagenet", "input_size": SIZE, "learning_rate": 3e-3},
    "deepspace": {
        "backbone": "tiny",
        "weights": "imagenet",
        "input_size": SIZE,
        "learning_rate": 1e-2,
        "patience": None,
    },
    "histogene": {**SEQUENCE, "width": 16},
    "thitogene": {**SEQUENCE, "capsules": 4, "capsule_width": 8, "graph_heads": 2},
}
RUN = {"random_state": 3, "device": "cpu", "progress": False}
ITERATIVE = [name for name, spec in MODELS.items() if spec.iterative]
NEEDS_FITTED = {"idw", "stage"}  # they read no image
SPOTWISE = [name for name, spec in MODELS.items() if spec.context == "spot"]


class Tiny(nn.Sequential):
    """A network of timm's kind, of a size for tests; timm's own are tested where they are loaded."""

    head_hidden_size = 64

    def __init__(self):
        super().__init__(nn.Conv2d(3, 64, 7, stride=7), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(pixels, "load_backbone", lambda *_, **__: Tiny())


def section(n=40, name="a", random_state=0):
    """Features, pixels and expression that depends on both, and on the place."""
    rng = np.random.default_rng(random_state)
    colors = rng.integers(0, 256, (n, 1, 1, 3)) + rng.integers(-60, 60, (n, SIZE, SIZE, 3))
    patches = colors.clip(0, 255).astype(np.uint8)
    xy, features = rng.uniform(0, 6, (n, 2)), rng.normal(size=(n, 5)).astype(np.float32)
    seen = np.hstack([patches.mean(axis=(1, 2)) / 100, features[:, :2], np.sin(xy[:, :1])])
    expression = (3 + seen + 0.1 * rng.normal(size=seen.shape)).clip(0).astype(np.float32)
    return Section(name=name, xy=xy, features=features, expression=expression, patches=lambda rows: patches[rows])


def only(whole, rows):
    """Some rows as points: without expression."""
    rows = np.asarray(rows)
    patches = lambda chosen: whole.patches(rows[chosen])  # noqa: E731
    return replace(whole, xy=whole.xy[rows], features=whole.features[rows], expression=None, patches=patches)


def build(name, epochs=2):
    return MODELS[name].load()(**QUICK.get(name, {}), **({"epochs": epochs} if MODELS[name].iterative else {}))


def fitted(name, *sections, epochs=2, **run):
    model = build(name, epochs)
    return model, model.fit(sections or [section()], **{**RUN, **run})


def bits(state):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_shapes(name):
    two = section(), section(30, "b", random_state=1)
    model, held_out = fitted(name, *two)
    assert [part.shape for part in held_out] == [(40, 6), (30, 6)]
    for part in held_out:
        known = np.isfinite(part)
        assert known.any(axis=0).all()
        assert_array_equal(known.all(axis=1), known.any(axis=1))  # a spot is held out as a whole
    predicted = model.predict(only(two[1], np.arange(7)))
    assert predicted.shape == (7, 6)
    assert predicted.dtype == np.float32
    assert np.isfinite(predicted).all()
    assert set(model.history) >= ({"train"} if MODELS[name].iterative else set())
    assert all(len(curve) == 2 and np.isfinite(curve).all() for curve in model.history.values())


def assert_points_are_independent(model, points):
    whole = model.predict(only(points, np.arange(30)))
    assert whole.std(axis=0).max() > 1e-4  # otherwise all orders are the same
    order = np.random.default_rng(0).permutation(30)
    assert_allclose(model.predict(only(points, order)), whole[order], atol=1e-5)
    for rows in ([4], [7, 2], np.arange(10, 29)):
        assert_allclose(model.predict(only(points, rows)), whole[rows], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_points_do_not_depend_on_each_other(name):
    model, _ = fitted(name)
    assert_points_are_independent(model, section(30, random_state=5))


@pytest.mark.parametrize("name", sorted(set(MODELS) - NEEDS_FITTED))
def test_points_of_a_section_that_was_not_fitted_do_not_depend_on_each_other(name):
    model, _ = fitted(name)
    stained = section(30, "stained", random_state=5)
    statistics = FeatureStatistics.of(3 * section(50, random_state=6).features + 1)  # of spots that are no points
    assert_points_are_independent(model, replace(stained, feature_statistics=statistics))
    if "features" in MODELS[name].inputs:
        points = only(stained, np.arange(30))
        changed = replace(points, feature_statistics=statistics)
        assert not np.allclose(model.predict(changed), model.predict(points), atol=1e-3)


@pytest.mark.parametrize("name", sorted(NEEDS_FITTED))
def test_models_without_image_refuse_a_section_that_was_not_fitted(name):
    model, _ = fitted(name)
    with pytest.raises(ValueError, match=r"'stained'.*fitted: \['a'\]"):
        model.predict(only(section(30, "stained"), np.arange(30)))


@pytest.mark.parametrize("name", MODELS)
def test_the_state_has_the_arrays_that_the_model_declares(name):
    model, _ = fitted(name)
    weights = {key for key in model.state() if key.startswith(model.state_prefix)}
    assert set(model.state()) - weights == set(model.state_names)
    assert bool(weights) == MODELS[name].iterative
    with pytest.raises(ValueError, match=f"{model.state_names[0]}.* missing. Fit again"):
        build(name).restore({})


@pytest.mark.parametrize("name", MODELS)
def test_predict_before_fit_is_refused(name):
    model = build(name)
    for call in (model.state, lambda: model.predict(only(section(), np.arange(3)))):
        with pytest.raises(RuntimeError, match="is not fitted yet: call fit or restore first"):
            call()


@pytest.mark.parametrize(
    ("name", "setting", "value", "error"),
    [
        ("attention", "n_factors", 0, ValueError),
        ("attention", "n_factors", "abc", TypeError),
        ("attention", "n_factors", True, TypeError),
        ("attention", "coherence", 1.5, ValueError),
        ("attention", "n_borrowed_spots", -1, ValueError),
        ("gp", "lengths", (1.0, 0.0), ValueError),
        ("gp", "noises", (), ValueError),
        ("gp", "lengths", "3", TypeError),
        ("gp", "power", float("nan"), ValueError),
        ("idw", "n_neighbors", 0, ValueError),
        ("idw", "n_neighbors", 2.5, TypeError),
        ("ridge", "alphas", [], ValueError),
        ("ridge", "alphas", [-1.0], ValueError),
        ("histosge", "variant", "other", ValueError),
        ("histosge", "validation_fraction", 1.0, ValueError),
        ("stage", "epochs", 0, ValueError),
        ("stnet", "weights", 3, TypeError),
        ("histogene", "depth", None, TypeError),
    ],
)
def test_values_of_settings_are_checked(name, setting, value, error):
    with pytest.raises(error, match=f"{setting} is .*"):
        models.build(name, {setting: value})


def test_settings_as_they_come_from_files_are_taken():
    built = models.build("gp", {"n_factors": np.int64(3), "lengths": np.array([1.0, 2.0]), "power": np.float32(0.5)})
    assert built.fit([section()], **RUN)[0].shape == (40, 6)
    assert models.build("attention", {"n_factors": None}).n_factors is None
    with pytest.raises(ValueError, match="has no params field"):
        models.build("gp", {"field": 3})


@pytest.fixture
def _threads():
    """Two threads, whatever the tests run on: sums that are shared out must not depend on who ends first."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_bits(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    (one, held_one), (two, held_two) = fitted(name), fitted(name)
    assert bits(one.state()) == bits(two.state())
    assert_array_equal(held_one[0], held_two[0])
    assert_array_equal(torch.get_rng_state(), before[0])
    assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("name", ITERATIVE)
def test_another_seed_another_fit(name):
    assert bits(fitted(name)[0].state()) != bits(fitted(name, random_state=4)[0].state())


@pytest.mark.parametrize("name", MODELS)
def test_state_survives_a_file(name):
    model, _ = fitted(name, section(), section(30, "b", random_state=1))
    again = build(name)
    kept = load(save({key: np.ascontiguousarray(array) for key, array in model.state().items()}))
    again.restore(kept)
    assert bits(again.state()) == bits(model.state())
    for where in ("a", "b"):
        points = only(section(20, where, random_state=5), np.arange(20))
        assert_array_equal(again.predict(points), model.predict(points))


@pytest.mark.parametrize("name", ITERATIVE)
def test_gradients_reach_every_weight(name):
    """After two steps: a head that starts at zero lets nothing through in the first."""
    reached, steps = {}, []

    def record(optimizer, *_):
        steps.append(optimizer)
        for group in optimizer.param_groups:
            for at, weight in enumerate(group["params"]):
                moved = weight.grad is not None and bool(weight.grad.abs().sum() > 0)
                reached[at] = reached.get(at, False) or moved

    hook = register_optimizer_step_pre_hook(record)
    try:
        fitted(name)
    finally:
        hook.remove()
    assert len(steps) >= 2
    assert reached
    assert all(reached.values()), [at for at, moved in reached.items() if not moved]


@pytest.mark.parametrize("name", ITERATIVE)
def test_overfitting_is_as_declared(name):
    """Expression that nothing explains: a model that reproduces it has overfitted."""
    spots = section(22)
    noise = np.random.default_rng(1).gamma(2, 1, (22, 6)).astype(np.float32)
    model, held_out = fitted(name, replace(spots, expression=noise), epochs=200)
    training = np.isnan(held_out[0]).any(axis=1)
    assert training.sum() >= 15
    predicted = model.predict(only(spots, np.arange(22)))
    r = np.corrcoef(predicted[training].ravel(), noise[training].ravel())[0, 1]
    assert (r > 0.9) == MODELS[name].can_overfit, f"r = {r:.3f}"


@pytest.mark.parametrize("name", SPOTWISE)
def test_spotwise_models_ignore_place_and_neighbors(name):
    model, _ = fitted(name)
    points = section(30, random_state=5)
    moved = replace(points, xy=points.xy[::-1] + 40)
    expected = model.predict(only(points, np.arange(30)))
    assert_array_equal(model.predict(only(moved, np.arange(30))), expected)


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(SPOTWISE)))
def test_other_models_read_more_than_the_spot(name):
    model, _ = fitted(name)
    points = only(section(30, random_state=5), np.arange(30))
    moved = replace(points, xy=points.xy[::-1].copy())
    assert not np.allclose(model.predict(moved), model.predict(points), atol=1e-5)


@pytest.fixture(scope="module")
def table(encoder):
    adata = synthetic(60, n_genes=10, random_state=1)
    pp.extract_features(adata, encoder)
    return adata


@pytest.mark.parametrize("name", MODELS)
def test_hidden_expression_never_leaks(table, name):
    seen = np.arange(60) % 3 > 0
    changed = table.copy()
    changed.X = changed.X.toarray()
    changed.X[~seen] = np.random.default_rng(0).gamma(2, 1, (20, 10))
    predictions = []
    for adata in (table.copy(), changed):
        params = {**QUICK.get(name, {}), **({"epochs": 2} if MODELS[name].iterative else {})}
        tl.fit(adata, name, params={**params, "device": "cpu"}, train_on=seen, random_state=1)
        tl.predict(adata)
        predictions.append(adata.layers["sthisto"])
    assert_array_equal(*predictions)
    assert predictions[0].any()
