"""THItoGene, block by block, against loops over the equations."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit, softmax
from torch.nn import functional

from sthisto._training import seeded
from sthisto.models import Section
from sthisto.models.baselines.thitogene import Capsules, DynamicConvolution, GraphAttention, THItoGene, squash

SMALL = {
    "input_size": 28,
    "capsules": 3,
    "capsule_width": 4,
    "depth": 1,
    "heads": 2,
    "head_width": 4,
    "mlp": 8,
    "epochs": 2,
}
RUN = {"random_state": 0, "device": "cpu", "progress": False}


def drawn(*shape, random_state=0):
    return np.random.default_rng(random_state).normal(size=shape)


def as_tensor(array):
    return torch.tensor(array, dtype=torch.float32)


def weights(module):
    return {name: value.detach().numpy().astype(float) for name, value in module.named_parameters()}


def shorten(s):
    length = np.linalg.norm(s)
    return (1 - np.exp(-length)) * s / length


def test_squash_keeps_directions_and_bounds_lengths():
    capsules = drawn(3, 4, 5) * 3
    found = squash(as_tensor(capsules)).numpy()
    for index in np.ndindex(3, 4):
        assert_allclose(found[index], shorten(capsules[index]), rtol=1e-5)
    assert (np.linalg.norm(found, axis=-1) < 1).all()
    still = as_tensor(np.zeros((1, 4))).requires_grad_()
    squash(still).sum().backward()
    assert torch.isfinite(still.grad).all()


def test_routing_is_that_of_the_equations():
    with seeded(0):
        module = Capsules(4, 3, 2, 5)
        torch.nn.init.normal_(module.prior)
    w, u = weights(module), drawn(6, 4, 3)
    found = module(as_tensor(u)).detach().numpy()
    for patch in range(6):
        votes = np.array([[u[patch, i] @ w["votes"][i, j] for j in range(2)] for i in range(4)])  # (i, j, q)
        agreement = np.array(
            [[sum(votes[i, j] @ votes[k, j] for k in range(4)) / np.sqrt(5) for j in range(2)] for i in range(4)]
        )
        coupling = softmax(agreement, axis=1) + w["prior"]
        for j in range(2):
            expected = shorten(sum(coupling[i, j] * votes[i, j] for i in range(4)))
            assert_allclose(found[patch, j], expected, rtol=1e-4, atol=1e-6)


def test_graph_attention_on_four_nodes():
    with seeded(0):
        module = GraphAttention(3, heads=2, head_width=2)
    w, h = weights(module), drawn(4, 3)
    graph = [[1, 2], [0, 3], [0, 1], [2, 1]]
    found = module(as_tensor(h), as_tensor(h)[torch.tensor(graph)]).detach().numpy()
    assert found.shape == (4, 4)
    for head in range(2):
        wh = h @ w["weight.weight"][2 * head : 2 * head + 2].T  # (4, 2)
        for i, others in enumerate(graph):
            heard = [i, *others]
            logits = np.array([w["own"][head] @ wh[i] + w["other"][head] @ wh[j] for j in heard])
            share = softmax(np.where(logits > 0, logits, 0.2 * logits))
            g = share @ wh[heard]
            expected = np.where(g > 0, g, np.expm1(g))
            assert_allclose(found[i, 2 * head : 2 * head + 2], expected, rtol=1e-4, atol=1e-6)


def test_dynamic_convolution_is_a_convolution_with_each_patchs_own_kernel():
    with seeded(0):
        module = DynamicConvolution(3, 5, 2, n_kernels=3, squeezed=4)
    w, images = weights(module), drawn(2, 3, 6, 8)
    found = module(as_tensor(images)).detach().numpy()
    for image, seen in zip(images, found, strict=True):
        mean = np.maximum(w["squeeze.0.weight"] @ image.mean(axis=(1, 2)) + w["squeeze.0.bias"], 0)
        told = {
            of: w[f"of_{of}.weight"] @ mean + w[f"of_{of}.bias"] for of in ("kernel", "filter", "channel", "position")
        }
        kernel = np.einsum("k,kocp->ocp", softmax(told["kernel"]), w["kernels"])
        kernel = kernel * np.einsum(
            "o,c,p->ocp", expit(told["filter"]), expit(told["channel"]), expit(told["position"])
        )
        expected = functional.conv2d(torch.tensor(image[None]), torch.tensor(kernel.reshape(5, 3, 2, 2)), stride=2)
        assert_allclose(seen, expected[0].numpy(), rtol=1e-4, atol=1e-5)


def section(n=24, name="a", input_size=28):
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (n, input_size, input_size, 3), dtype=np.uint8)
    expression = rng.gamma(2, 1, (n, 3)).astype(np.float32)
    return Section(name=name, xy=rng.uniform(0, 5, (n, 2)), expression=expression, patches=lambda rows: patches[rows])


def test_a_spot_is_told_the_same_in_learning_and_as_a_point():
    """What the network gives a whole section and what it predicts at its spots differ by an own key counted twice."""
    model = THItoGene(**SMALL, dropout=0.0, learning_rate=1e-2)
    whole = section()
    (held_out,) = model.fit([whole], **RUN)
    learnt = np.isnan(held_out).all(axis=1)
    state, network = model.state(), model._network
    xy = state["xy"]
    rows = np.argsort(np.linalg.norm(xy[:, None] - xy, axis=-1), axis=1)[:, :5]
    seen = torch.tensor(whole.patches(np.flatnonzero(learnt)))
    together = network(seen, as_tensor(xy - xy.min(axis=0)), torch.tensor(rows)).detach().numpy() + state["gene_mean"]
    alone = model.predict(whole)[learnt]
    assert np.abs(alone - together).max() < 0.2 * together.std(axis=0).min()
    assert_array_equal(rows[:, 0], np.arange(len(xy)))


def test_a_point_hears_the_graph_around_it():
    model = THItoGene(**SMALL)
    model.fit([section()], **RUN)
    stained = section(5, name="b")
    assert model._neighbors(stained.xy, 0).shape == (5, 5)
    assert model._neighbors(stained.xy, -1).shape == (5, 0)
    assert np.isfinite(model.predict(stained)).all()


def test_the_papers_sizes():
    with torch.device("meta"):
        network = THItoGene().network(10, 40)
    assert network.blocks[0].mlp[1].weight.shape == (2048, 22 * 64)  # 20 capsules, x and y
    assert network.graph.weight.weight.shape == (512, 22 * 64)
    assert network.convolutions[8].weight.shape == (128, 1, 11, 11)


def test_a_patch_too_small_for_the_convolutions():
    with pytest.raises(ValueError, match="input_size is 27 px; the convolutions of thitogene need 28 or more"):
        THItoGene(**{**SMALL, "input_size": 27}).fit([section(input_size=27)], **RUN)
