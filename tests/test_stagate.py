"""STAGATE against its equations in numpy, with every neighborhood an n x n matrix."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from sthisto.domains import agreement
from sthisto.domains._clusters import kmeans, mixture
from sthisto.domains._graph import Graph
from sthisto.domains.stagate import Input, Network, Stagate, gram

CPU = torch.device("cpu")
N, GENES, HIDDEN, DIM = 20, 12, 7, 3


def lattice(side: int):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)


@pytest.fixture
def parts():
    """Expression, a random symmetric graph as a matrix with its diagonal, and a network with its weights."""
    rng = np.random.default_rng(0)
    expression = rng.random((N, GENES)).astype(np.float32)
    links = np.triu(rng.random((N, N)) < 0.2, 1)
    torch_rng = torch.Generator().manual_seed(0)
    network = Network(GENES, HIDDEN, DIM)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=torch_rng) / 2
    return expression, links | links.T | np.eye(N, dtype=bool), Graph.of(np.argwhere(links), N), network


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def by_hand(expression, linked, network):
    """Attention, embedding, reconstruction and loss as the paper has them."""
    w1, w2, sender, receiver = (weight.detach().numpy().astype(float) for weight in network.parameters())
    projected = expression @ w1
    scores = 1 / (1 + np.exp(-(projected @ sender + (projected @ receiver).T)))
    weights = np.where(linked, np.exp(scores), 0)
    attention = weights / weights.sum(axis=1, keepdims=True)
    embedding = elu(attention @ projected) @ w2
    rebuilt = elu(attention @ (embedding @ w2.T)) @ w1.T
    return attention, embedding, rebuilt, ((expression - rebuilt) ** 2).mean()


def test_layers_are_those_of_the_paper(parts):
    expression, linked, graph, network = parts
    attention, embedding, rebuilt, loss = by_hand(expression, linked, network)
    source = Input.of(expression, 1e-4, 0, CPU)
    _, found, embedded = network.encode(source, graph)
    assert_allclose(found.detach(), attention[graph.rows, graph.columns], atol=1e-5)
    assert_allclose(embedded.detach(), embedding, atol=1e-5)
    unfolded = network.unfold(embedded, found, graph)
    assert_allclose((unfolded @ network.down.T).detach(), rebuilt, atol=1e-5)
    assert network.loss(source, graph).item() == pytest.approx(loss, abs=1e-5)


def test_gradients_are_those_of_the_plain_network(parts):
    """The graph's own gradients and the loss without a reconstruction, against autograd on full matrices."""
    expression, linked, graph, network = parts
    network.double()
    x = torch.from_numpy(expression).double()
    network.loss(Input(x, None, float((x**2).sum())), graph).backward()
    found = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    down, squeeze, sender, receiver = network.parameters()
    projected = x @ down
    scores = torch.sigmoid(projected @ sender + (projected @ receiver).T).masked_fill(~torch.from_numpy(linked), -1e9)
    attention = torch.softmax(scores, dim=1)
    embedding = torch.nn.functional.elu(attention @ projected) @ squeeze
    rebuilt = torch.nn.functional.elu(attention @ embedding @ squeeze.T) @ down.T
    torch.nn.functional.mse_loss(rebuilt, x).backward()
    for mine, weight in zip(found, network.parameters(), strict=True):
        assert_allclose(mine, weight.grad, rtol=1e-6, atol=1e-10)


def test_gram():
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
    assert_allclose(gram(x).detach(), (x.T @ x).detach())
    assert torch.autograd.gradcheck(lambda x: gram(x) * weights, x)


@pytest.mark.parametrize("noise", [0.0, 3e-3, 0.5])
def test_input_of_low_rank_is_read_from_its_factors(noise):
    rng = np.random.default_rng(0)
    expression = rng.random((300, 5)) @ rng.random((5, 260)) + noise * rng.random((300, 260))
    expression = expression.astype(np.float32)
    source = Input.of(expression, 1e-4, 0, CPU)
    assert (source.loadings is None) == (noise > 0.1)
    weights = torch.randn(260, 3, generator=torch.Generator().manual_seed(0))
    exact = expression @ weights.numpy()
    assert_allclose(source.project(weights), exact, atol=0.02 * exact.std())
    assert source.size == expression.size
    assert source.squares == pytest.approx((expression.astype(float) ** 2).sum())
    assert Input.of(expression, 0, 0, CPU).loadings is None


def test_low_rank_trains_alike():
    rng = np.random.default_rng(0)
    expression = (rng.random((289, 3)) @ rng.random((3, 260))).astype(np.float32)
    curves = []
    for low_rank in (0, 1e-4):
        method = Stagate(epochs=20, hidden=8, dim=3, low_rank=low_rank)
        method.embed(expression, lattice(17), np.zeros(289, dtype=int), random_state=0, progress=False)
        curves.append(method.history["train"])
    assert_allclose(curves[0], curves[1], rtol=1e-2)


def halves(random_state: int, noise: float):
    """Two halves of a tissue that differ in genes too noisy to tell a spot by."""
    rng, xy = np.random.default_rng(random_state), lattice(14)
    truth = (xy[:, 0] > 6.5).astype(int)
    expression = 1 + truth[:, None] * (np.arange(30) % 2) * 0.6 + noise * rng.normal(size=(len(xy), 30))
    return np.maximum(expression, 0).astype(np.float32), xy, truth


def test_finds_what_neighbors_agree_on():
    expression, xy, truth = halves(0, noise=1.0)
    method = Stagate(epochs=300, hidden=64, dim=8)
    embedding = method.embed(expression, xy, np.zeros(len(xy), dtype=int), random_state=0, progress=False)
    alone = max(agreement(each(expression, 2, random_state=0), truth) for each in (mixture, kmeans))
    assert agreement(mixture(embedding, 2, random_state=0), truth) > max(0.7, alone + 0.15)
    assert method.history["train"][-1] < method.history["train"][0] / 2


def test_same_seed_same_bits():
    expression, xy, _ = halves(0, noise=0.3)

    def embed(random_state):
        method = Stagate(epochs=5, hidden=16, dim=4)
        return method.embed(expression, xy, np.zeros(len(xy), dtype=int), random_state=random_state, progress=False)

    before = torch.get_rng_state()
    first, again, other = embed(0), embed(0), embed(1)
    assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert_array_equal(torch.get_rng_state(), before)


def test_a_spot_without_neighbors_is_read_by_itself():
    expression, _, graph, network = (np.ones((1, GENES), np.float32), None, Graph.of(np.empty((0, 2), int), 1), None)
    network = Network(GENES, HIDDEN, DIM)
    _, attention, embedding = network.encode(Input.of(expression, 0, 0, CPU), graph)
    assert attention.tolist() == [1.0]
    assert torch.isfinite(embedding).all()
