"""ST-Net, and how models that read pixels get them from fit, predict and upsample."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sthisto import images, pp, tl
from sthisto._data import _section
from sthisto.datasets import synthetic
from sthisto.models import Section
from sthisto.models._network import split_sections, without_features
from sthisto.models.baselines import stnet as pixels
from sthisto.models.baselines.stnet import StNet, load_backbone, rotated

FIELD = 12
SMALL = {"weights": "imagenet", "input_size": FIELD, "epochs": 3, "learning_rate": 1e-3, "batch_size": 8}
RUN = {"random_state": 0, "device": "cpu", "progress": False}


class Tiny(nn.Sequential):
    """A network of timm's kind, of a size for tests; it sees which way up a patch is."""

    head_hidden_size = 27

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 4, stride=4), nn.Tanh(), nn.Flatten())
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(pixels, "load_backbone", lambda *_, **__: Tiny())


@pytest.fixture(scope="session")
def timm():
    try:
        import timm  # noqa: PLC0415  where it does not load, only what needs it is skipped
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm does not load here: {error}")
    return timm


def section(n=30, name="a", random_state=0, level=1.0):
    rng = np.random.default_rng(random_state)
    patches = rng.integers(0, 256, (n, FIELD, FIELD, 3), dtype=np.uint8)
    expression = (level + rng.gamma(2, 1, (n, 4))).astype(np.float32)
    return Section(name=name, xy=rng.uniform(0, 5, (n, 2)), expression=expression, patches=lambda rows: patches[rows])


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_eight_symmetries():
    patches = section(8).patches(np.arange(8))
    found = rotated(torch.tensor(patches), torch.arange(8)).numpy()
    for symmetry in range(8):
        expected = np.rot90(patches[symmetry], symmetry % 4)
        assert_array_equal(found[symmetry], np.fliplr(expected) if symmetry >= 4 else expected)
    same = rotated(torch.tensor(patches[:1]).expand(8, -1, -1, -1), torch.arange(8))
    assert len({one.numpy().tobytes() for one in same}) == 8


@pytest.mark.usefixtures("tiny")
def test_predictions_are_the_same_whichever_way_up():
    whole = section()
    model = StNet(**{**SMALL, "learning_rate": 1e-2})
    model.fit([whole], **RUN)
    expected = model.predict(whole)
    over = replace(whole, patches=lambda rows: np.rot90(whole.patches(rows), axes=(1, 2))[:, :, ::-1].copy())
    assert_allclose(model.predict(over), expected, atol=1e-5)
    once = model._network(torch.tensor(whole.patches(np.arange(5)))).detach().numpy()
    assert np.abs(once + model.state()["gene_mean"] - expected[:5]).max() > 1e-3  # one view alone is another answer


@pytest.mark.usefixtures("tiny")
def test_it_starts_from_the_gene_means_of_the_spots_it_learns_from():
    one, two = section(), section(20, "b", random_state=1, level=6.0)
    model = StNet(**{**SMALL, "learning_rate": 0.0})
    held_out = model.fit([one, two], **RUN)
    for whole, held in zip((one, two), held_out, strict=True):
        learnt = np.isnan(held).all(axis=1)
        assert learnt.mean() == pytest.approx(0.9, abs=0.02)
        mean = whole.expression[learnt].mean(axis=0)
        assert_allclose(model.predict(whole), np.tile(mean, (len(whole), 1)), rtol=1e-5)
        assert_allclose(held[~learnt], np.tile(mean, ((~learnt).sum(), 1)), rtol=1e-5)
    pooled = (27 * model.state()["gene_mean"][0] + 18 * model.state()["gene_mean"][1]) / 45
    assert_allclose(model.predict(replace(one, name="c"))[0], pooled, rtol=1e-5)
    squared = ((two.expression - model.predict(two)) ** 2).sum(axis=1)
    squared_one = ((one.expression - model.predict(one)) ** 2).sum(axis=1)
    learnt = [np.isnan(held).all(axis=1) for held in held_out]
    expected = np.concatenate([squared_one[learnt[0]], squared[learnt[1]]]).mean()
    assert_allclose(model.history["train"], expected, rtol=1e-4)  # summed over genes, mean over spots


@pytest.mark.usefixtures("tiny")
def test_held_out_spots_are_not_learnt_from():
    whole = section()
    rows = split_sections([whole], 0.1, 0)[1][0]
    changed = whole.expression.copy()
    changed[rows] += 9
    one, two = StNet(**SMALL), StNet(**SMALL)
    held = one.fit([whole], **RUN)[0]
    assert_array_equal(np.flatnonzero(np.isfinite(held[:, 0])), rows)
    assert_array_equal(two.fit([replace(whole, expression=changed)], **RUN)[0], held)
    assert two.history["validation"][0] > one.history["validation"][0]


def test_a_part_of_a_part():
    whole = section()
    inner = without_features(without_features(whole, np.arange(10, 30)), np.array([3, 5]))
    assert_array_equal(inner.patches(np.array([1, 0])), whole.patches(np.array([15, 13])))
    assert_array_equal(inner.expression, whole.expression[[13, 15]])


@pytest.mark.usefixtures("tiny")
def test_random_weights_are_warned_of():
    with pytest.warns(UserWarning, match=r"StNet starts from random weights.*less accurate.*imagenet"):
        StNet(**{**SMALL, "weights": None, "epochs": 1}).fit([section()], **RUN)


@pytest.mark.usefixtures("tiny")
def test_missing_patches_are_told():
    with pytest.raises(ValueError, match="section 'a' has no picture to cut patches from; pass image="):
        StNet(**SMALL).fit([replace(section(), patches=None)], **RUN)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'densenet121' needs timm, which does not load here .*pip install"):
        load_backbone("densenet121", None)


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_weights_of_a_local_file(timm, tmp_path, form):
    source = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / f"weights.{form}"
    (save_file if form == "safetensors" else torch.save)(source.state_dict(), path)
    loaded = load_backbone("test_resnet", str(path)).eval()
    patches = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = source.eval().forward_head(source.forward_features(patches), pre_logits=True)
    assert_array_equal(loaded(patches).detach(), expected.detach())


def test_weights_that_do_not_fit(timm, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file 'image_net' with weights of 'test_resnet'"):
        load_backbone("test_resnet", "image_net")
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), other)
    with pytest.raises(ValueError, match="holds no weights of timm's 'test_resnet'"):
        load_backbone("test_resnet", str(other))


@pytest.mark.usefixtures("timm")
def test_the_network_of_the_paper():
    with torch.device("meta"):
        network = load_backbone(StNet().backbone, None)
        described = network(torch.zeros(2, 3, 224, 224))
    assert described.shape == (2, network.head_hidden_size) == (2, 1024)
    schedule = StNet().schedule()
    assert (schedule.optimizer, schedule.momentum, schedule.learning_rate) == ("sgd", 0.9, 1e-6)
    assert (schedule.batch_size, schedule.epochs, schedule.patience) == (32, 50, None)


@pytest.mark.usefixtures("timm")
def test_a_network_of_timm_same_seed_same_bits():
    settings = {**SMALL, "weights": None, "backbone": "test_resnet", "input_size": 32, "epochs": 1}

    def fit():
        model = StNet(**settings)
        patches = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        whole = replace(section(20), patches=lambda rows: patches[rows])
        with pytest.warns(UserWarning, match="random weights"):
            model.fit([whole], **RUN)
        return model, whole

    model, whole = fit()
    again = StNet(**settings)
    again.restore(model.state())
    assert_array_equal(again.predict(whole), model.predict(whole))
    assert_array_equal(fit()[0].predict(whole), model.predict(whole))


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _stained():
    return synthetic(40, n_genes=10, random_state=4)


@pytest.fixture
def stained(_stained):
    return _stained.copy()


def picture(adata):
    (entry,) = adata.uns["spatial"].values()
    return entry["images"]["hires"]


def fit(adata, **options):
    tl.fit(adata, "stnet", params={**SMALL, "epochs": 2, "patch_um": 80.0, "device": "cpu"}, **options)
    return adata


def predicted(adata, **options):
    tl.predict(adata, **options)
    return adata.layers["sthisto"]


@pytest.mark.usefixtures("tiny")
def test_patches_are_those_around_the_spots_at_the_sections_scale(stained, monkeypatch):
    seen = []
    monkeypatch.setattr(_section, "sample_patches", lambda *asked: seen.append(asked) or images.sample_patches(*asked))
    fit(stained, train_on=np.arange(40) >= 10)
    image, xy, side, input_size = seen[0]
    assert_allclose(xy, stained.obsm["spatial"][10:])
    assert (side, input_size) == (pytest.approx(80 / 2.0), FIELD)  # the synthetic picture has 2 um/px
    assert_array_equal(image.read(0, 0, 5, 0, 5), picture(stained)[:5, :5])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("form", ["array", "path", "mapping", "name", "features"])
def test_a_picture_may_be_given_in_any_form(stained, tmp_path, encoder, form):
    expected = predicted(fit(stained.copy()))
    path = tmp_path / "stain.png"
    Image.fromarray(picture(stained)).save(path)
    (library,) = stained.uns["spatial"]
    array = picture(stained)
    forms = {"array": array, "path": str(path), "mapping": {library: str(path)}, "name": "hires", "features": None}
    if form == "features":  # the picture that they were taken from
        pp.extract_features(stained, encoder, image=str(path), mpp=2.0)
    if form != "name":
        stained.uns["spatial"][library]["images"]["hires"] = np.zeros_like(array)  # of no use any more
    found = predicted(fit(stained, image=forms[form]), image=array if form == "array" else None)
    assert_allclose(found, expected, atol=1e-4)


@pytest.mark.usefixtures("tiny")
def test_the_map_runs_through_the_predictions_at_the_spots(stained):
    at_spots = predicted(fit(stained))
    assert at_spots.std(axis=0).max() > 0
    assert_array_equal(tl.upsample(stained, stained.obsm["spatial"]).X, at_spots)
    assert tl.upsample(stained, 2).n_obs > 100


@pytest.mark.usefixtures("tiny")
def test_an_array_has_to_be_passed_again(stained, refuses):
    array = picture(stained)
    fit(stained, image=array)
    with refuses(stained, KeyError, "taken from an array, which is not kept: pass it again as image="):
        tl.predict(stained)
    with refuses(stained, KeyError, "taken from an array, which is not kept: pass it again as image="):
        tl.upsample(stained, 2)
    assert tl.upsample(stained, stained.obsm["spatial"], image=array).n_obs == 40


@pytest.mark.usefixtures("tiny")
def test_no_picture(stained, refuses):
    del stained.uns["spatial"]
    with refuses(stained, KeyError, r"no image of section 'section' .*Pass image="):
        fit(stained)


@pytest.mark.usefixtures("tiny")
def test_points_outside_the_picture(stained, refuses):
    fit(stained)
    with refuses(stained, ValueError, "1 of 1 points are outside the image"):
        tl.upsample(stained, [[9000.0, 9000.0]])
    stained.obsm["spatial"] = stained.obsm["spatial"] + 2000
    with refuses(stained, ValueError, "points are outside the image"):
        fit(stained)


@pytest.mark.usefixtures("tiny")
def test_a_section_that_was_only_stained(stained):
    fit(stained)
    other = synthetic(40, n_genes=10, random_state=5)
    found = tl.predict(other, reference=stained)
    assert found.shape == (40, 10)
    assert_array_equal(tl.predict(other, reference=stained, image=picture(other)).X, found.X)
    darker = (picture(other) // 2).astype(np.uint8)
    assert not np.array_equal(tl.predict(other, reference=stained, image=darker).X, found.X)
