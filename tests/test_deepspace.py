"""DeepSpaCE: what it does other than ST-Net."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from sthisto.models import Section
from sthisto.models._network import split_sections
from sthisto.models.baselines import stnet as pixels
from sthisto.models.baselines.deepspace import DeepSpace
from sthisto.models.baselines.stnet import load_backbone

FIELD = 8
SMALL = {"weights": "imagenet", "input_size": FIELD, "batch_size": 16, "learning_rate": 1e-2}
RUN = {"random_state": 0, "device": "cpu", "progress": False}


class Tiny(nn.Sequential):
    """A network of timm's kind, of a size for tests."""

    head_hidden_size = 12

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 4, stride=4), nn.Tanh(), nn.Flatten())
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}


@pytest.fixture
def asked(monkeypatch):
    """What was asked of timm."""
    calls = []
    monkeypatch.setattr(pixels, "load_backbone", lambda *args, **named: calls.append((args, named)) or Tiny())
    return calls


def section(n=40, random_state=0):
    rng = np.random.default_rng(random_state)
    patches = rng.integers(0, 256, (n, FIELD, FIELD, 3), dtype=np.uint8)
    expression = rng.gamma(2, 1, (n, 3)).astype(np.float32)
    return Section(name="a", xy=rng.uniform(0, 5, (n, 2)), expression=expression, patches=lambda rows: patches[rows])


def test_the_network_of_the_paper(asked):
    DeepSpace(**SMALL, epochs=1).fit([section()], **RUN)
    assert asked == [(("vgg16", "imagenet"), {"dropout": 0.5})]
    schedule = DeepSpace().schedule()
    assert (schedule.optimizer, schedule.learning_rate, schedule.weight_decay) == ("adam", 1e-4, 1e-4)
    assert (schedule.batch_size, schedule.patience) == (128, 5)


def test_smooth_l1():
    predicted, measured = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.0]])
    assert_allclose(DeepSpace().error(predicted, measured), (0.5 * 0.5**2 + (3 - 0.5)) / 2)


@pytest.mark.usefixtures("asked")
def test_it_stops_early_and_keeps_the_best():
    """Noise is learnt by heart, and the held-back spots soon tell."""
    whole = section()
    model = DeepSpace(**SMALL, epochs=200, patience=4)
    held_out = model.fit([whole], **RUN)[0]
    curve = model.history["validation"]
    assert len(curve) < 200
    assert np.argmin(curve) == len(curve) - 5
    rows = split_sections([whole], 0.1, 0)[1][0]
    error = nn.functional.smooth_l1_loss(torch.tensor(held_out[rows]), torch.tensor(whole.expression[rows]))
    assert_allclose(error, curve.min(), rtol=1e-4)  # of the prediction, so with the best weights


@pytest.mark.usefixtures("asked")
def test_a_patch_is_seen_one_way_up():
    whole = section()
    model = DeepSpace(**SMALL, epochs=3)
    model.fit([whole], **RUN)
    once = model._network(torch.tensor(whole.patches(np.arange(40)))).detach().numpy()
    assert_allclose(model.predict(whole), once + model.state()["gene_mean"], atol=1e-5)
    over = replace(whole, patches=lambda rows: whole.patches(rows)[:, ::-1].copy())
    assert not np.allclose(model.predict(over), model.predict(whole), atol=1e-4)


def test_vgg16_of_timm():
    """Its last hidden layer of 4096 is what the genes are read from."""
    try:
        import timm  # noqa: F401, PLC0415
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm does not load here: {error}")
    with torch.device("meta"):
        network = load_backbone("vgg16", None, dropout=0.5)
        described = network(torch.zeros(2, 3, 224, 224))
    assert described.shape == (2, network.head_hidden_size) == (2, 4096)
    assert [each.p for each in network.modules() if isinstance(each, nn.Dropout) and each.p] != []


@pytest.mark.usefixtures("asked")
def test_same_seed_same_bits():
    found = [DeepSpace(**SMALL, epochs=4).fit([section()], **RUN)[0] for _ in range(2)]
    assert_array_equal(*found)
