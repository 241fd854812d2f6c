"""STAGE: its losses and layers by hand, and the laws that a model keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import wasserstein_distance

from sthisto import _training
from sthisto.models import Section
from sthisto.models.baselines.stage import WIDTHS, Autoencoder, Stage, _directions, sliced_wasserstein, stage_loss

RUN = {"random_state": 0, "device": "cpu", "progress": False}
SMALL = {"epochs": 3, "widths": (12, 6, 2), "n_directions": 5}


def spots(random_state: int = 0, n: int = 40, g: int = 4, name: str = "a") -> Section:
    rng = np.random.default_rng(random_state)
    return Section(name=name, xy=rng.uniform(2, 12, (n, 2)), expression=rng.random((n, g), dtype=np.float32))


def points(random_state: int = 1, m: int = 25, name: str = "a") -> Section:
    return Section(name=name, xy=np.random.default_rng(random_state).uniform(0, 14, (m, 2)))


def fitted(*sections: Section, **params) -> Stage:
    model = Stage(**(SMALL | params))
    model.fit(sections or [spots()], **RUN)
    return model


def layers_by_hand(x, layers):
    """Linear layers with leaky ReLU (slope 0.01) between them."""
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(linear):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = x if i == len(linear) - 1 else np.where(x > 0, x, 0.01 * x)
    return x


def tiny():
    with _training.seeded(0):
        network = Autoencoder(5, (4, 3, 2))
        for weight in network.parameters():
            torch.nn.init.normal_(weight)
    return network, np.random.default_rng(0).random((7, 5), dtype=np.float32)


def test_the_layers_are_the_papers():
    network = Autoencoder(30, WIDTHS)
    shapes = [tuple(weight.shape) for name, weight in network.named_parameters() if name.endswith("weight")]
    encoder = [(1000, 30), (500, 1000), (50, 500), (10, 50), (2, 10)]
    assert shapes == encoder + [shape[::-1] for shape in reversed(encoder)]


def test_forward_pass_by_hand():
    network, x = tiny()
    latent, rebuilt = network(torch.from_numpy(x))
    z = layers_by_hand(x, network.encoder)
    assert (layers_by_hand(x, network.encoder[:1]) < 0).any(), "the slope is seen"
    assert_allclose(latent.detach(), z, rtol=1e-5, atol=1e-5)
    assert_allclose(rebuilt.detach(), layers_by_hand(z, network.decoder), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 99))
def test_sliced_wasserstein_against_scipy(n, k, random_state):
    one, other = np.random.default_rng(random_state).normal(size=(2, n, 2))
    directions = _directions(k, _training.generator(random_state)).double()
    assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)
    expected = np.mean([wasserstein_distance(one @ along, other @ along) for along in directions.numpy()])
    found = sliced_wasserstein(torch.from_numpy(one), torch.from_numpy(other), directions)
    assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_directions_go_all_ways():
    directions = _directions(4000, _training.generator(0)).numpy()
    assert np.abs(directions.mean(axis=0)).max() < 0.05
    assert_allclose(np.cov(directions.T), np.eye(2) / 2, atol=0.03)


def test_loss_by_hand():
    network, x = tiny()
    rng = np.random.default_rng(1)
    places, angle = rng.uniform(-1, 1, (7, 2)).astype(np.float32), rng.uniform(0, 6, 9)
    directions = np.c_[np.cos(angle), np.sin(angle)].astype(np.float32)
    z = layers_by_hand(x, network.encoder)
    off = layers_by_hand(z, network.decoder) - x
    sliced = np.mean([wasserstein_distance(z @ along, places @ along) for along in directions])
    expected = (off**2).mean() + 0.1 * np.abs(off).mean() + np.abs(z - places).mean() + 0.1 * sliced
    found = stage_loss(network, *map(torch.from_numpy, (x, places, directions)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_prediction_is_the_decoder_at_the_coordinates():
    corners = np.array([[2.0, 10], [8, 10], [8, 13], [2, 13]])
    section = Section(name="a", xy=corners, expression=np.eye(4, dtype=np.float32))
    model = fitted(section, validation_fraction=0.25)
    there = Section(name="a", xy=np.array([[2, 10], [5, 11.5], [8, 13], [11, 11.5]]))
    scaled = np.array([[-1, -0.5], [0, 0], [1, 0.5], [2, 0]])
    assert_allclose(model.predict(there), layers_by_hand(scaled, model._network[0].decoder), atol=1e-5)


def test_twenty_spots_can_be_learnt_by_heart():
    section = spots(n=20)
    model = Stage(epochs=600, widths=(64, 32, 2), learning_rate=1e-2)
    (held_out,) = model.fit([section], **RUN)
    learnt = np.isnan(held_out[:, 0])
    assert learnt.sum() == 17
    assert np.isfinite(held_out[~learnt]).all()
    error = (model.predict(section) - section.expression) ** 2
    assert error[learnt].mean() < 0.25 * section.expression[learnt].var()
    assert_allclose(held_out[~learnt], model.predict(section)[~learnt], atol=1e-5)
    assert model.history["train"].shape == (600,)
    assert_allclose(model.history["validation"][-1], error[~learnt].mean(), rtol=1e-4)


def test_a_smooth_map_is_found_between_the_spots():
    section, there = spots(n=120), points()
    pattern = lambda xy: np.c_[xy[:, 0] / 5, np.sin(xy[:, 1] / 3)].astype(np.float32)  # noqa: E731
    section = Section(name="a", xy=section.xy, expression=pattern(section.xy))
    model = fitted(section, epochs=300, widths=(64, 32, 2), learning_rate=5e-3)
    inside = ((there.xy > 2) & (there.xy < 12)).all(axis=1)
    predicted, truth = model.predict(there)[inside], pattern(there.xy)[inside]
    assert min(np.corrcoef(predicted[:, g], truth[:, g])[0, 1] for g in (0, 1)) > 0.95


def test_same_seed_same_bits_and_the_state_is_all():
    sections = [spots(), spots(1, name="β-2")]
    before = torch.get_rng_state()
    model, again, other = (Stage(**SMALL) for _ in range(3))
    held_out = np.concatenate(model.fit(sections, **RUN))
    assert_array_equal(np.concatenate(again.fit(sections, **RUN)), held_out)
    assert_array_equal(torch.get_rng_state(), before)
    state = model.state()
    assert all(value.dtype.kind in "iuf" for value in state.values())
    other.restore({key: value.copy() for key, value in state.items()})
    for name in ("a", "β-2"):
        assert_array_equal(again.predict(points(name=name)), model.predict(points(name=name)))
        assert_array_equal(other.predict(points(name=name)), model.predict(points(name=name)))
    again.fit(sections, **(RUN | {"random_state": 1}))
    assert not np.array_equal(again.predict(points()), model.predict(points()))


def test_permuted_points_permute_the_prediction():
    model, there = fitted(), points()
    order = np.random.default_rng(0).permutation(25)
    shuffled = Section(name="a", xy=there.xy[order])
    assert_allclose(model.predict(shuffled), model.predict(there)[order], atol=1e-6)
    assert model.predict(points(m=0)).shape == (0, 4)


def test_what_is_held_out_was_not_seen():
    section = spots()
    (first,) = Stage(**SMALL).fit([section], **RUN)
    held_out = np.isfinite(first[:, 0])
    section.expression[held_out] += 5
    assert_array_equal(Stage(**SMALL).fit([section], **RUN)[0], first)


def test_sections_do_not_mix():
    a, b = spots(), spots(7, n=30, name="b")
    there = points()
    expected = fitted(a, b).predict(there)
    b.expression[:] = 9
    assert_array_equal(fitted(a, b).predict(there), expected)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match=r"'new'.*fitted: \['a'\]"):
        fitted().predict(points(name="new"))
    with pytest.raises(ValueError, match="must differ"):
        fitted(spots(), spots(1))
    with pytest.raises(ValueError, match="no measured expression"):
        fitted(points())
    with pytest.raises(ValueError, match=r"\(8, 3\).*hence 2"):
        Stage(widths=(8, 3))
