"""HisToGene: attention against plain numpy, places against interpolation, and points beside spots."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax
from torch import nn

from sthisto._training import seeded
from sthisto.models import Section
from sthisto.models.baselines.histogene import Attention, HisToGene, PositionEmbedding, nearest

FIELD = 6
SMALL = {"input_size": FIELD, "width": 12, "depth": 2, "heads": 2, "head_width": 4, "mlp": 8, "epochs": 3}
RUN = {"random_state": 0, "device": "cpu", "progress": False}


def section(n=30, name="a", random_state=0, level=2.0):
    rng = np.random.default_rng(random_state)
    patches = rng.integers(0, 256, (n, FIELD, FIELD, 3), dtype=np.uint8)
    expression = (level + rng.gamma(2, 0.5, (n, 4))).astype(np.float32)
    xy = rng.uniform(3, 9, (n, 2))
    return Section(name=name, xy=xy, expression=expression, patches=lambda rows: patches[rows])


def fitted(*sections, **params):
    model = HisToGene(**{**SMALL, "learning_rate": 1e-2, **params})
    return model, model.fit(sections or [section()], **RUN)


@pytest.fixture
def attention():
    with seeded(0):
        module = Attention(5, heads=2, head_width=3, dropout=0.5)
        nn.init.normal_(module.norm.weight)
        nn.init.normal_(module.norm.bias)
        return module.eval()


def by_hand(module, asking, asked):
    """Attention (m, c) of tokens to tokens (n, c), head by head."""
    weights = {name: value.detach().numpy().astype(float) for name, value in module.named_parameters()}

    def normed(tokens):
        centred = tokens - tokens.mean(axis=1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return unit * weights["norm.weight"] + weights["norm.bias"]

    q, _, _ = np.split(normed(asking) @ weights["qkv.weight"].T, 3, axis=1)
    _, k, v = np.split(normed(asked) @ weights["qkv.weight"].T, 3, axis=1)
    heads = [slice(3 * head, 3 * head + 3) for head in range(2)]
    heard = [softmax(q[:, each] @ k[:, each].T / np.sqrt(3), axis=1) @ v[:, each] for each in heads]
    return np.hstack(heard) @ weights["out.0.weight"].T + weights["out.0.bias"]


def test_attention_is_that_of_the_paper(attention):
    tokens = np.random.default_rng(0).normal(size=(7, 5))
    found = attention(torch.tensor(tokens, dtype=torch.float32)).detach().numpy()
    assert_allclose(found, by_hand(attention, tokens, tokens), atol=1e-5)


def test_a_point_attends_to_the_spots_and_to_itself_alone(attention):
    rng = np.random.default_rng(1)
    spots, points = rng.normal(size=(7, 5)), rng.normal(size=(3, 5))
    beside = attention.attend(*(torch.tensor(each, dtype=torch.float32) for each in (points, spots))).detach().numpy()
    for point, found in zip(points, beside, strict=True):
        assert_allclose(found, by_hand(attention, point[None], np.vstack([spots, point]))[0], atol=1e-5)


def test_no_matrix_of_all_spots_with_all_spots_is_kept(attention):
    kept = []
    tokens = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        attention.train()(tokens).sum().backward()
    assert 0 < max(kept) < 2000**2 / 50


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 9), st.floats(-3, 9)), min_size=1, max_size=8))
def test_places_are_interpolated_and_end_flat(xy):
    with seeded(0):
        place = PositionEmbedding(5, 3)
    found = place(torch.tensor(xy, dtype=torch.float32))
    for axis, table in enumerate((place.x, place.y)):
        at = np.array(xy, dtype=np.float32)[:, axis]
        expected = np.stack([np.interp(at, np.arange(5), column) for column in table.detach().numpy().T], axis=1)
        assert_allclose(found[axis].detach().numpy(), expected, atol=1e-5)


def test_a_prediction_is_that_of_one_sequence_that_nobody_else_hears():
    """Spots and one point through the network by hand: spots hear spots, the point hears all."""
    model, _ = fitted()
    network, state = model._network, model.state()
    point = section(1, random_state=9)
    corner = state["xy"].min(axis=0)
    xy = torch.tensor(np.vstack([state["xy"], point.xy]) - corner, dtype=torch.float32)
    seen = network.encode(torch.tensor(point.patches(np.arange(1))))
    tokens = network.join(torch.cat([torch.tensor(state["encoded"]), seen]), *network.position(xy))
    for block in network.blocks:
        spots = block.attention(tokens[:-1])
        last = block.attention(tokens)[-1:]  # among all, only the last row may have heard the point
        tokens = tokens + torch.cat([spots, last])
        tokens = tokens + block.mlp(tokens)
    expected = network.out(tokens[-1:]).detach().numpy() + state["gene_mean"]
    assert_allclose(model.predict(point), expected, atol=1e-5)


def test_held_out_spots_are_predicted_as_points():
    whole = section()
    model, (held_out,) = fitted(whole)
    rows = np.flatnonzero(np.isfinite(held_out).all(axis=1))
    assert len(rows) == 3  # a tenth
    assert len(model.state()["xy"]) == 27
    assert_allclose(model.predict(whole)[rows], held_out[rows], atol=1e-5)
    changed = whole.expression.copy()
    changed[rows] += 5
    _, (again,) = fitted(replace(whole, expression=changed))
    assert_array_equal(again, held_out)


def test_the_map_is_continuous():
    model, _ = fitted()
    points = section(20, random_state=3)
    on_spots = replace(points, xy=model.state()["xy"][:20])
    for place in (points, on_spots):
        near = replace(place, xy=place.xy + 1e-4)
        assert_allclose(model.predict(near), model.predict(place), atol=1e-2)
        assert np.abs(model.predict(replace(place, xy=place.xy + 1)) - model.predict(place)).max() > 2e-2


def test_a_section_never_fitted_has_no_place():
    model, _ = fitted(section(), section(25, "b", random_state=1))
    stained = section(20, "c", random_state=2)
    predicted = model.predict(stained)
    assert_array_equal(model.predict(replace(stained, xy=stained.xy[::-1] * 7)), predicted)
    state, network = model.state(), model._network
    places = []
    for own in (0, 1):
        xy = state["xy"][state["section"] == own]
        places.append(network.position(torch.tensor(xy - xy.min(axis=0), dtype=torch.float32)))
    x, y = (torch.cat(axis).mean(dim=0).detach().numpy() for axis in zip(*places, strict=True))
    found = [each.numpy() for each in (axis[0].detach() for axis in model._embeddings(stained.xy, -1))]
    assert_allclose(found[0], x, atol=1e-6)
    assert_allclose(found[1], y, atol=1e-6)


def test_each_section_keeps_its_level():
    one = section()
    levels = [fitted(one, section(25, "b", random_state=1, level=level))[0] for level in (2.0, 7.0)]
    there = section(25, "b", random_state=1)
    assert_allclose(levels[1].predict(there) - levels[0].predict(there), 5, atol=0.05)
    assert_allclose(levels[1].predict(one), levels[0].predict(one), atol=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 99))
def test_nearest_spots(n, k, random_state):
    rng = np.random.default_rng(random_state)
    points, spots = rng.uniform(size=(4, 2)), rng.uniform(size=(n, 2))
    distance = np.linalg.norm(points[:, None] - spots, axis=-1)
    assert_array_equal(nearest(points, spots, k), np.argsort(distance, axis=1)[:, :k])


def test_what_is_refused():
    with pytest.raises(ValueError, match="section 'a' has no picture to cut patches from; pass image="):
        fitted(replace(section(), patches=None))
    with pytest.raises(ValueError, match="names of sections must differ"):
        fitted(section(), section())
    with pytest.raises(ValueError, match="no measured expression"):
        fitted(replace(section(), expression=None))
    with pytest.raises(ValueError, match="epochs is 0"):
        fitted(epochs=0)
