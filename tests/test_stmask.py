"""STMask against its losses and graph convolutions in numpy; what is hidden stays hidden."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from sthisto.domains._graph import Graph, nearest_pairs
from sthisto.domains.stmask import Channel, Network, StMask, scaled_cosine_error, some, unlinked

N, FEATURES, HIDDEN, LATENT = 25, 6, 8, 4


def lattice(side: int):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    pairs = nearest_pairs(lattice(5) + rng.normal(size=(N, 2)) / 10, np.zeros(N, dtype=int), 4)
    features = torch.from_numpy(rng.normal(size=(N, FEATURES)).astype(np.float32))
    network = Network(FEATURES, HIDDEN, LATENT)
    torch_rng = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=torch_rng) / 2
    return pairs, features, Graph.of(pairs, N), network


def adjacency(pairs):
    """Normalised, n x n, with the diagonal."""
    links = np.eye(N)
    links[pairs[:, 0], pairs[:, 1]] = links[pairs[:, 1], pairs[:, 0]] = 1
    degree = links.sum(axis=1)
    return links / np.sqrt(degree[:, None] * degree)


def convolve(channel: Channel, links, features):
    (w1, b1), (w2, b2) = (
        [p.detach().numpy().astype(float) for p in layer.parameters()] for layer in channel.children()
    )
    hidden = links @ features @ w1.T + b1
    hidden = np.where(hidden > 0, hidden, np.expm1(np.minimum(hidden, 0)))
    return links @ (hidden @ w2.T + b2)


def test_scaled_cosine_error():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 5))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    for alpha in (1.0, 2.0, 3.0):
        error = scaled_cosine_error(torch.from_numpy(a), torch.from_numpy(b), alpha)
        assert_allclose(error, (1 - cosine) ** alpha, atol=1e-10)


def test_both_channels_are_two_graph_convolutions(parts):
    pairs, features, graph, network = parts
    expected = [convolve(each, adjacency(pairs), features.numpy()) for each in (network.spots, network.links)]
    assert_allclose(network.codes(features, graph).detach(), np.concatenate(expected, axis=1), atol=1e-5)


def test_the_guess_by_hand(parts):
    pairs, features, graph, network = parts
    hidden = np.arange(N) % 5 == 0
    links, masked = adjacency(pairs), features.numpy().copy()
    masked[hidden] = network.token.detach()
    codes = convolve(network.spots, links, masked)
    codes[hidden] = 0
    weight, bias = (p.detach().numpy() for p in network.back.parameters())
    guessed = network.guess(features, torch.from_numpy(hidden), graph)
    assert_allclose(guessed.detach(), links @ (codes @ weight.T + bias), atol=1e-5)


def test_nothing_of_a_hidden_spot_reaches_the_guess(parts):
    _, features, graph, network = parts
    hidden = torch.arange(N) % 3 == 0
    other = torch.where(hidden[:, None], features + 100, features)
    assert_array_equal(*(network.guess(each, hidden, graph).detach() for each in (features, other)))


def test_links_by_hand(parts):
    """Cross-entropy of scalar products, from codes on the graph without the dropped links."""
    pairs, features, graph, network = parts
    dropped = np.arange(len(pairs)) % 4 == 0
    others = np.array([[0, 24], [4, 20], [2, 22]])
    keep = torch.from_numpy(np.append(~dropped, True))[graph.pair]
    found = network.link_error(
        features, graph, keep, Graph.of(pairs[dropped], N, loops=False), Graph.of(others, N, loops=False)
    )
    codes = convolve(network.links, adjacency(pairs[~dropped]), features.numpy())

    def sigmoid(ends):
        return 1 / (1 + np.exp(-(codes[ends[:, 0]] * codes[ends[:, 1]]).sum(axis=1) / np.sqrt(LATENT)))

    expected = -np.log(sigmoid(pairs[dropped])).mean() - np.log(1 - sigmoid(others)).mean()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_masks():
    assert [int(some(n, share).sum()) for n, share in ((10, 0.2), (10, 0.0), (1, 0.2), (1000, 0.25))] == [2, 1, 1, 250]
    assert not torch.equal(some(1000, 0.5), some(1000, 0.5))


def test_pairs_that_are_no_links():
    pairs = nearest_pairs(lattice(6), np.zeros(36, dtype=int), 4)
    found = unlinked(pairs, 36, 500)
    assert len(found) > 400
    assert (found[:, 0] < found[:, 1]).all()
    assert not {tuple(pair) for pair in found} & {tuple(pair) for pair in pairs}


def test_learns_and_repeats():
    rng = np.random.default_rng(0)
    xy = lattice(10)
    expression = (rng.random((100, 20)) + np.sin(xy[:, :1] + np.arange(20))).astype(np.float32)

    def embed(random_state):
        method = StMask(epochs=40, learning_rate=1e-2, hidden=16, latent=8, dim=5)
        return method, method.embed(expression, xy, np.zeros(100, dtype=int), random_state=random_state, progress=False)

    before = torch.get_rng_state()
    (method, first), (_, again), (_, other) = embed(0), embed(0), embed(1)
    assert first.shape == (100, 5)
    assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert_array_equal(torch.get_rng_state(), before)
    assert method.history["train"][-5:].mean() < 0.8 * method.history["train"][0]
