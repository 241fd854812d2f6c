"""Networks as encoders: the laws, the pooling, the forward pass, and records that bring them back."""

import contextlib
import importlib.machinery
import json
import logging
import shutil
import sys
import types
import warnings
from dataclasses import replace
from hashlib import sha256

import anndata
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import sthisto
from sthisto import encoders
from sthisto.encoders import ENCODERS, _network, _sources, has_tokens, has_weights
from sthisto.encoders._architectures import differences, is_meta, timm_backbone
from sthisto.encoders._network import infer_output_spec
from sthisto.encoders._registry import is_redistributable
from sthisto.encoders._weights import WeightFile

NETWORKS = [name for name, spec in ENCODERS.items() if spec.weights]
TIMM = [name for name in NETWORKS if ENCODERS[name].builder == "timm"]
SMALL = {"img_size": 48, "init_values": 1.0, "reg_tokens": 2}
# Name, field, weights in millions as their authors or papers count them, and pixels between tokens.
PUBLISHED = {
    "uni": (224, 303, 16),
    "uni2-h": (224, 681, 14),
    "h-optimus-0": (224, 1135, 14),
    "h-optimus-1": (224, 1135, 14),
    "h0-mini": (224, 86, 14),
    "virchow": (224, 631, 14),
    "virchow2": (224, 631, 14),
    "openmidnight": (224, 1135, 14),
    "gigapath": (224, 1135, 16),
    "kaiko-b8": (224, 86, 8),
    "kaiko-s16": (224, 22, 16),
    "lunit-s8": (224, 22, 8),
    "resnet50": (224, 9, 16),  # to the third stage
}


def patches(n=3, side=48, random_state=0):
    return np.random.default_rng(random_state).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


@pytest.fixture(scope="session")
def vit():
    """A tiny ViT with random weights, class token and registers."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, **SMALL).eval()


@pytest.fixture(scope="session")
def file(vit, tmp_path_factory):
    """Its weights, in a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture
def tiny(monkeypatch):
    """A registry with the tiny ViT as ``tiny``, and, with a license that forbids it, as ``forbidden``."""
    spec = replace(
        ENCODERS["uni"], architecture="test_vit", params=SMALL, input_size=48, patch_um=24.0, gated=False, license="MIT"
    )
    monkeypatch.setitem(ENCODERS, "tiny", spec)
    monkeypatch.setitem(ENCODERS, "forbidden", replace(spec, license="CC-BY-NC-ND-4.0", gated=True))


@pytest.fixture(scope="session")
def encoder(vit):
    return encoders.load(vit, input_size=48, pooling="both", name="tiny")


def colors(spec_or_encoder, these):
    """Normalised colors by hand."""
    mean, std = (np.asarray(getattr(spec_or_encoder, name)) for name in ("mean", "std"))
    return torch.tensor((these / 255 - mean) / std).permute(0, 3, 1, 2).float()


# The registry


@pytest.mark.parametrize("name", TIMM)
def test_an_entry_is_what_its_authors_published(name):
    spec = ENCODERS[name]
    input_size, millions, stride = PUBLISHED[name]
    backbone = timm_backbone(spec.architecture, spec.params)
    assert is_meta(backbone)  # nothing is held in memory
    shape = infer_output_spec(backbone, spec.input_size, spec.pooling)
    assert (shape.dim, shape.stride, spec.input_size) == (spec.dim, stride, input_size)
    assert spec.mpp == 0.5
    assert round(sum(weight.numel() for weight in backbone.parameters()) / 1e6) == millions


def test_the_registry_has_what_it_should():
    assert set(NETWORKS) == {*PUBLISHED, "midnight", "phikon-v2"}
    gated = {name for name in NETWORKS if ENCODERS[name].gated}
    assert gated == {"uni", "uni2-h", "h-optimus-1", "h0-mini", "virchow", "virchow2", "openmidnight", "gigapath"}
    free = {name for name in NETWORKS if is_redistributable(ENCODERS[name].license, gated=ENCODERS[name].gated)}
    assert free == {"h-optimus-0", "midnight", "resnet50"}
    assert all(ENCODERS[name].parameters == millions for name, (_, millions, _) in PUBLISHED.items())
    assert all(ENCODERS[name].reference and "/" in ENCODERS[name].weights for name in NETWORKS)


def test_the_table_is_sorted_by_score_and_says_what_may_be_used():
    table = encoders.table()
    assert list(table.index) == [*table["hest"].dropna().sort_values(ascending=False).index, "handcrafted"]
    commercial = table.index[table["commercial"].eq(True)]  # noqa: FBT003
    assert set(commercial) == {"h-optimus-0", "virchow", "midnight", "openmidnight", "resnet50", "handcrafted"}
    assert set(table.index[table["commercial"].isna()]) == {"kaiko-b8", "kaiko-s16"}  # their cards have to be read
    assert not table.loc[table["license"].str.contains("NC|non-commercial|research"), "commercial"].any()


# UNI as it is


def drawn(name, shape):
    """Weights as timm draws them, but for LayerScale, which is 1, so that the input matters."""
    if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight")):
        return torch.ones(shape)
    return torch.zeros(shape) if name.endswith("bias") else torch.randn(shape) * 0.02


def test_unis_features_are_those_of_the_bare_network(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        network = timm.create_model("vit_large_patch16_224", init_values=1e-5, num_classes=0, dynamic_img_size=True)
    state = {name: drawn(name, value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    save_file(state, tmp_path / "uni.safetensors")
    red = np.zeros((1, 224, 224, 3), np.uint8)
    red[..., 0] = 255
    these = np.concatenate([patches(1, 224), red])
    plain = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(ENCODERS["uni"].mean)) / torch.tensor(ENCODERS["uni"].std)
    by_hand = colors(ENCODERS["uni"], these)
    torch.testing.assert_close(by_hand[1], plain.view(3, 1, 1).expand(3, 224, 224))  # red is the first channel
    with torch.inference_mode():
        expected = network.eval()(by_hand).numpy()
    del network, state
    encoder = encoders.load("uni", weights=tmp_path / "uni.safetensors", device="cpu")
    found = encoder(these)
    assert (found.dtype, encoder.dim, encoder.token_dim, encoder.stride) == (np.float32, 1024, 1024, 16)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.1  # the input matters


def test_red_is_the_first_channel():
    encoder = encoders.load(Means(), input_size=20, mean=(0, 0, 0), std=(1, 1, 1))
    red = np.zeros((1, 20, 20, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_allclose(encoder(red), [[1, 0, 0]])


# Laws


def test_the_contract(encoder):
    assert has_tokens(encoder)
    assert has_weights(encoder)
    assert (encoder.dim, encoder.token_dim, encoder.stride) == (128, 64, 16)
    for n in (0, 1, 3):
        assert encoder(patches(n)).shape == (n, 128)
        assert encoder.tokens(patches(n)).shape == (n, 3, 3, 64)
        assert encoder(patches(n)).dtype == encoder.tokens(patches(n)).dtype == np.float32


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(9)), cut=st.integers(1, 8))
def test_a_row_depends_on_its_own_patch_alone(encoder, order, cut):
    these = patches(9)
    together = encoder(these)
    shuffled = these[order]
    apart = np.concatenate([encoder(shuffled[:cut]), encoder(shuffled[cut:])])
    np.testing.assert_allclose(apart, together[order], atol=1e-5)


def test_the_same_batch_gives_the_same_bits_and_leaves_the_patches_alone(encoder):
    these = patches(5)
    these.flags.writeable = False
    assert encoder(these).tobytes() == encoder(these).tobytes()
    planes_first = np.ascontiguousarray(these.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(encoder(planes_first), encoder(these))


def test_no_global_state_is_read_or_set(file, tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = encoders.load("tiny", weights=file)(patches())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    with torch.autocast("cpu", torch.bfloat16):  # of the user's, which is not ours
        np.testing.assert_array_equal(encoders.load("tiny", weights=file)(patches()), first)


def test_other_patches_are_refused(encoder):
    for wrong in (np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 48, 48, 3)), np.zeros((48, 48, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"\(n, 48, 48, 3\); found"):
            encoder(wrong)
        with pytest.raises(ValueError, match=r"\(n, 48, 48, 3\); found"):
            encoder.tokens(wrong)


# Pooling


def test_poolings_are_of_the_same_tokens(vit, file, tiny):
    class_, mean, both, native = (
        encoders.load("tiny", weights=file, pooling=each) for each in ("class", "mean", "both", "native")
    )
    these = patches()
    with torch.inference_mode():
        raw = vit.forward_features(colors(ENCODERS["tiny"], these)).numpy()
    np.testing.assert_allclose(class_(these), raw[:, 0], atol=1e-5)
    np.testing.assert_allclose(mean(these), raw[:, 3:].mean(1), atol=1e-5)  # without class and registers
    np.testing.assert_allclose(both(these), np.concatenate([raw[:, 0], raw[:, 3:].mean(1)], axis=1), atol=1e-5)
    np.testing.assert_allclose(native(these), raw[:, 0], atol=1e-5)
    np.testing.assert_allclose(class_.tokens(these).mean((1, 2)), mean(these), atol=1e-5)


def test_tokens_are_in_reading_order(encoder):
    """A change of one square of pixels changes its own token most."""
    plain = np.full((1, 48, 48, 3), 128, np.uint8)
    for row, column in [(0, 0), (0, 2), (2, 1)]:
        changed = plain.copy()
        changed[0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = [255, 0, 40]
        away = np.linalg.norm(encoder.tokens(changed) - encoder.tokens(plain), axis=-1)[0]
        assert np.unravel_index(away.argmax(), away.shape) == (row, column)


def test_maps_of_a_convolutional_network_are_tokens(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet50").eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    encoder = encoders.load("resnet50", weights=tmp_path / "resnet.pth")
    these = patches(2, 224)
    with torch.inference_mode():
        x = colors(ENCODERS["resnet50"], these)
        maps = network.forward_intermediates(x, indices=[3], intermediates_only=True)[0].numpy()
    assert (encoder.dim, encoder.token_dim, encoder.stride) == (1024, 1024, 16)
    np.testing.assert_allclose(encoder.tokens(these), maps.transpose(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(encoder(these), maps.mean((2, 3)), atol=1e-4)
    with pytest.raises(ValueError, match="pooling='class': the network gives no class token; set pooling='native'"):
        encoders.load("resnet50", weights=tmp_path / "resnet.pth", pooling="class")


def test_maps_with_channels_last_are_read_so():
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, img_size=48)

    class Last(nn.Module):
        output_fmt = "NHWC"

        def forward_features(self, x):
            return network.forward_features(x)[:, 1:].unflatten(1, (3, 3))

        def forward_head(self, x, *, pre_logits):
            return x.mean((1, 2))

    encoder = encoders.load(Last(), input_size=48)
    assert (encoder.token_dim, encoder.stride) == (64, 16)
    np.testing.assert_allclose(encoder(patches()), encoder.tokens(patches()).mean((1, 2)), atol=1e-5)


# Modules of one's own


class Means(nn.Module):
    """Mean colors, and a weight that is learnt."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.weight


def test_a_module_is_taken_as_it_is_now():
    module = Means()
    encoder = encoders.load(module, input_size=20, patch_um=60, mean=(0, 0, 0), std=(1, 1, 1))
    before = encoder(patches(2, 20))
    np.testing.assert_allclose(before, patches(2, 20).mean((1, 2)) / 255, atol=1e-6)
    with torch.no_grad():
        module.weight.mul_(2)
    np.testing.assert_array_equal(encoder(patches(2, 20)), before)
    assert module.training
    assert module.weight.requires_grad
    assert (encoder.name, encoder.dim, encoder.input_size, encoder.patch_um) == ("Means", 3, 20, 60)
    assert not has_tokens(encoder)


def test_a_module_that_is_an_encoder_is_left_alone():
    class Own(Means):
        name, dim, input_size, patch_um = "own", 3, 20, 10.0

        def __call__(self, patches):
            return patches.mean((1, 2)).astype(np.float32)

    own = Own()
    assert encoders.load(own) is own


def test_what_a_module_lacks_is_said():
    with pytest.raises(ValueError, match="the input size of Means is unknown: pass input_size="):
        encoders.load(Means())
    with pytest.raises(ValueError, match="pooling='mean': the network gives no tokens; set pooling='native'"):
        encoders.load(Means(), input_size=20, pooling="mean")
    with pytest.raises(ValueError, match=r"weights= is given with a torch.nn.Module: load"):
        encoders.load(Means(), input_size=20, weights="a.safetensors")
    with pytest.raises(ValueError, match=r"the network gives tuple for one patch"):
        encoders.load(Both(), input_size=20)
    with pytest.raises(ValueError, match=r"has no pooling \(shape \(1, 400, 3\)\): set pooling='mean'"):
        encoders.load(Tokens(), input_size=20)


class Both(Means):
    def forward(self, x):
        return super().forward(x), x


class Tokens(Means):
    def forward(self, x):
        return x.flatten(2).mT


def test_a_module_of_timms_brings_its_input_along(vit):
    encoder = encoders.load(timm.create_model("test_vit", num_classes=5))
    assert (encoder.input_size, encoder.dim, encoder.stride) == (160, 64, 16)


# The forward pass


def test_bfloat16_is_close_and_float32_is_the_default_on_the_cpu(file, tiny):
    exact, coarse = (encoders.load("tiny", weights=file, device="cpu", precision=each) for each in (None, "bfloat16"))
    assert (exact.precision, coarse.precision) == ("float32", "bfloat16")
    one, other = exact(patches()), coarse(patches())
    assert other.dtype == np.float32
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


def test_a_compiled_network_gives_the_same(file, tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    plain, fast = (encoders.load("tiny", weights=file, compile=each) for each in (False, True))
    np.testing.assert_array_equal(plain(patches()), fast(patches()))
    assert compiled == [fast._backbone]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_the_batch_halves_where_memory_runs_out_and_says_so(file, tiny, caplog, monkeypatch, error):
    encoder = encoders.load("tiny", weights=file)
    these = patches(11)
    expected = encoder(these)
    asked = []

    def short(x):
        asked.append(len(x))
        if len(x) > 3:
            raise error
        return encoder._backbone(x)

    monkeypatch.setattr(encoder, "_raw", short)
    np.testing.assert_allclose(encoder(these), expected, atol=1e-5)
    assert asked == [11, 5, 2, 2, 2, 2, 2, 1]
    assert "out of memory on cpu at 11 patches; batch_size is 5 from here on" in caplog.text
    encoder.tokens(these)
    assert asked[8:] == [2, 2, 2, 2, 2, 1]


def test_no_memory_for_a_single_patch_is_an_error_and_other_errors_come_out(file, tiny, monkeypatch):
    encoder = encoders.load("tiny", weights=file)
    monkeypatch.setattr(encoder, "_raw", raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(MemoryError, match="cpu has too little memory for a single patch"):
        encoder(patches())
    monkeypatch.setattr(encoder, "_raw", raising(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        encoder(patches())


def raising(error):
    def fail(_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:9"}, r"device 'cuda:9' is not there; torch .* finds .*cpu"),
        ({"device": "abacus"}, r"device 'abacus' is not there; torch .* finds .*cpu"),
        ({"precision": "float16"}, "precision='float16': choose one of 'float32', 'bfloat16'"),
        ({"pooling": "max"}, "pooling='max': choose one of 'class', 'mean', 'both', 'native'"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        encoders.load("uni", weights="nowhere", **options)


def test_a_package_that_is_missing_is_named(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers.*pip install --upgrade 'sthisto\[transformers\]'"):
        encoders.load("phikon-v2")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm.*pip install --upgrade timm torch torchvision"):
        encoders.load("uni", weights=file)


@pytest.fixture
def phikon(tmp_path):
    """Phikon's architecture with two blocks, as a folder of the Hub with its own colors; its spec, and the network."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    spec = replace(ENCODERS["phikon-v2"], params={**ENCODERS["phikon-v2"].params, "num_hidden_layers": 2})
    network = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("dinov2", **spec.params)).eval()
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.1] * 3}))
    return spec, network, tmp_path


def test_phikon_through_transformers(phikon):
    spec, network, folder = phikon
    encoder = spec.load("phikon-v2", weights=folder / "model.safetensors", device="cpu")
    these = patches(2, 224)
    with torch.inference_mode():
        raw = network(pixel_values=colors(spec, these)).last_hidden_state
    np.testing.assert_allclose(encoder(these), raw[:, 0], atol=1e-4)
    np.testing.assert_allclose(encoder.tokens(these).reshape(2, 196, -1), raw[:, 1:], atol=1e-4)
    assert (encoder.dim, encoder.stride) == (1024, 16)
    other = {**network.state_dict(), "nose": torch.zeros(1), "layernorm.bias": torch.zeros(2)}
    del other["layernorm.weight"]
    with pytest.raises(
        ValueError, match=r"1 missing: layernorm.weight; 1 unexpected: nose; 1 of another shape: layerno"
    ):
        encoder._backbone.load_weights(other, "here")
    with pytest.warns(UserWarning, match="under Owkin non-commercial license: do not share it"):
        made = encoders.record(encoder, keep_weights=True)
    np.testing.assert_array_equal(encoders.restore(made, device="cpu")(these), encoder(these))


def test_a_repository_in_the_form_of_transformers(phikon):
    spec, network, folder = phikon
    encoder = encoders.load("hf-hub:owkin/phikon-v2", weights=folder, pooling="both", device="cpu")
    these = patches(2, 224)
    with torch.inference_mode():
        given = colors(replace(spec, mean=(0.5,) * 3, std=(0.1,) * 3), these)
        raw = network(pixel_values=given).last_hidden_state
    np.testing.assert_allclose(encoder(these), torch.cat([raw[:, 0], raw[:, 1:].mean(1)], dim=1), atol=1e-4)


# Building


def test_networks_that_compute_something_while_they_are_built_are_built_in_full():
    backbone = timm_backbone("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1})  # rotary embedding, in no file
    assert not is_meta(backbone)
    assert infer_output_spec(backbone, 28, "mean").stride == 14


def test_what_timm_cannot_build_is_said():
    with pytest.raises(ValueError, match="legs of 'vit_huge_patch14_224'"):
        timm_backbone("vit_huge_patch14_224", {"legs": 4})


def test_models_of_lazyslide_are_loaded_by_name(monkeypatch):
    """A package of this name with one image model, which takes an image and a batch as theirs do."""

    class Model:
        def to(self, device):
            self.device = device

        def get_transform(self):
            return lambda patch: torch.from_numpy(patch.copy()).permute(2, 0, 1).float() / 255

        def encode_image(self, batch):
            return batch.mean(dim=(2, 3))

    package = types.ModuleType("lazyslide_models")
    package.__spec__ = importlib.machinery.ModuleSpec("lazyslide_models", None)
    package.MODEL_REGISTRY = {"colors-of-a-patch": Model, "segmenter": object}
    monkeypatch.setitem(sys.modules, "lazyslide_models", package)
    for name in ("colors-of-a-patch", "lazyslide:colors-of-a-patch"):
        encoder = encoders.load(name, batch_size=2, device="cpu")
        assert (encoder.name, encoder.dim, encoder.batch_size) == ("lazyslide:colors-of-a-patch", 3, 2)
    these = patches(5, 224)
    np.testing.assert_allclose(encoder(these), these.mean((1, 2)) / 255, rtol=1e-4)
    assert encoder(these[:0]).shape == (0, 3)
    assert encoders.restore(encoders.record(encoder)).name == encoder.name
    with pytest.raises(KeyError, match=r"no encoder 'segmenter'.*lazyslide_models"):
        encoders.load("segmenter")
    with pytest.raises(ValueError, match="takes no weights="):
        encoders.load("colors-of-a-patch", weights="a.safetensors")


def test_metadata_does_not_fetch_a_repository_silently(file, tiny, monkeypatch):
    asked = []
    found = WeightFile(file, sha256(file.read_bytes()).hexdigest(), repo_id="owner/name", revision="1")
    monkeypatch.setattr(_sources, "from_hub", lambda *where: (asked.append(where), found)[1])
    made = encoders.record(encoders.load("tiny", weights=file))
    for repo_id, expectation in (
        ("owner/name", pytest.warns(UserWarning, match="loaded from the repository 'owner/name' of the Hub")),
        (ENCODERS["uni"].weights, contextlib.nullcontext()),
    ):
        with expectation:
            encoders.restore({**made, "provenance": {**made["provenance"], "repo_id": repo_id, "revision": "1"}})
    assert asked == [("owner/name", "1"), (ENCODERS["uni"].weights, "1")]


def test_metadata_cannot_make_timm_unpickle_or_download(tmp_path, file, tiny):
    """`checkpoint_path` would be unpickled, a name such as hf-hub:... would be fetched."""
    made = encoders.record(encoders.load("tiny", weights=file))
    for key, value in {"params": '{"checkpoint_path": "x.pt"}', "architecture": "hf-hub:owner/name"}.items():
        with pytest.raises(ValueError, match=r"checkpoint_path|no architecture 'hf-hub:owner/name'"):
            encoders.restore({**made, "provenance": {**made["provenance"], key: value}})
    config = {"architecture": "test_vit", "model_args": {"checkpoint_path": str(tmp_path / "x.pt")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(file, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint_path of 'test_vit'"):
        encoders.load("hf-hub:owner/name", weights=tmp_path)
    with pytest.raises(ValueError, match=r"no layer 'Sponge' in timm.layers or torch.nn"):
        timm_backbone("test_vit", {"mlp_layer": "Sponge"})


def test_weights_in_their_authors_form_are_renamed_as_timm_does(vit, tmp_path):
    """DINOv2's own files have other names for the same weights."""
    network = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28, depth=1)
    own = {}
    for name, value in network.state_dict().items():
        own[name.replace("reg_token", "register_tokens")] = value
    own["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), own["pos_embed"]], dim=1)
    own["mask_token"] = torch.zeros(1, 384)
    backbone = timm_backbone("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 1})
    backbone.load_weights(own, "here")
    found = backbone.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items() if "reg" in name)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_differences_are_all_named(data):
    shapes = st.dictionaries(st.sampled_from("abcde"), st.sampled_from([(1,), (2,), (2, 2)]))
    found, expected = ({name: torch.empty(shape) for name, shape in data.draw(shapes).items()} for _ in range(2))
    said = "; ".join(differences(found, expected))
    assert (said == "") == (
        set(found) == set(expected) and all(found[name].shape == expected[name].shape for name in found)
    )
    assert (f"{len(set(expected) - set(found))} missing" in said) == bool(set(expected) - set(found))
    assert (f"{len(set(found) - set(expected))} unexpected" in said) == bool(set(found) - set(expected))


# Records


def through(adata, how, path):
    """An AnnData written and read again."""
    if how == "h5ad":
        adata.write_h5ad(path / "a.h5ad")
        return anndata.read_h5ad(path / "a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr, on strings
        adata.write_zarr(path / "a.zarr")
        return anndata.read_zarr(path / "a.zarr")


@pytest.mark.parametrize("how", ["h5ad", "zarr"])
def test_an_object_with_weights_reproduces_its_features_alone(how, file, tiny, tmp_path, monkeypatch):
    adata = sthisto.datasets.synthetic(60, n_genes=12, random_state=1)
    sthisto.pp.extract_features(adata, encoders.load("tiny", weights=file, pooling="both"), keep_weights=True)
    sthisto.tl.fit(adata, "ridge")
    expected = sthisto.tl.upsample(adata, 2, encoder=encoders.load("tiny", weights=file, pooling="both"))
    back = through(adata, how, tmp_path)
    monkeypatch.delitem(ENCODERS, "tiny")  # neither the registry
    monkeypatch.setattr("sthisto.encoders._sources.from_hub", raising(AssertionError("network")))
    monkeypatch.setattr("sthisto.encoders._sources.from_disk", raising(AssertionError("disk")))
    dense = sthisto.tl.upsample(back, 2)
    np.testing.assert_array_equal(dense.X, expected.X)
    assert "weights" not in dense.uns["sthisto"]["features"]["X_histo"]
    made = back.uns["sthisto"]["features"]["X_histo"]
    sthisto.pp.extract_features(back, encoders.restore(made), key_added="again")
    np.testing.assert_array_equal(back.obsm["again"], adata.obsm["X_histo"])
    assert back.uns["sthisto"]["features"]["again"]["provenance"]["sha256"] == sha256(file.read_bytes()).hexdigest()


def test_without_kept_weights_the_source_is_asked_and_has_to_be_the_same(file, tiny, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    made = encoders.record(encoders.load("tiny", weights=copy))
    assert "weights" not in made
    np.testing.assert_array_equal(encoders.restore(made)(patches()), encoders.load("tiny", weights=file)(patches()))
    state = timm.create_model("test_vit", num_classes=0, **SMALL).state_dict()
    save_file(state, copy)
    with pytest.raises(ValueError, match=r"weights of 'tiny' in .*copy.safetensors' have changed since the features"):
        encoders.restore(made)
    copy.unlink()
    with pytest.raises(FileNotFoundError, match=r"copy\.safetensors"):
        encoders.restore(made)


def test_a_record_of_the_hub_asks_for_its_commit(file, tiny, monkeypatch):
    made = encoders.record(encoders.load("tiny", weights=file))
    made["provenance"] |= {"repo_id": "lab/tiny", "revision": "abc", "file": "model.safetensors"}
    asked = []

    def from_hub(*given):
        asked.append(given)
        return encoders._weights.from_disk(file)

    monkeypatch.setattr("sthisto.encoders._sources.from_hub", from_hub)
    with pytest.warns(UserWarning, match="repository 'lab/tiny' of the Hub"):
        assert encoders.restore(made).dim == 64
    assert asked == [("lab/tiny", "abc")]


@pytest.mark.filterwarnings("ignore:the object now holds")
def test_damaged_weights_in_an_object_are_refused(file, tiny):
    made = encoders.record(encoders.load("forbidden", weights=file), keep_weights=True)
    made["weights"] = made["weights"].copy()
    made["weights"][-1] ^= 1
    with pytest.raises(ValueError, match="the kept weights are damaged: their SHA-256 is"):
        encoders.restore(made)


def test_a_license_that_forbids_passing_on_is_named(file, tiny):
    with pytest.warns(
        UserWarning, match="holds the weights of 'forbidden', under CC-BY-NC-ND-4.0, gated: do not share"
    ):
        made = encoders.record(encoders.load("forbidden", weights=file), keep_weights=True)
    assert made["provenance"]["license"] == "CC-BY-NC-ND-4.0"
    assert json.loads(json.dumps(made["provenance"]["params"]))
    encoders.record(encoders.load("tiny", weights=file), keep_weights=True)  # MIT: no warning, which would be an error


def test_what_cannot_be_brought_back_is_not_kept(encoder, section):
    with pytest.raises(ValueError, match="network 'tiny' is a module of your own"):
        encoders.record(encoder, keep_weights=True)
    with pytest.raises(KeyError, match=r"encoder 'tiny' was an object and cannot be loaded by name .*pass the object"):
        encoders.restore(encoders.record(encoder))
    with pytest.raises(KeyError, match="encoder 'colors' was an object"):
        encoders.restore({"encoder": "colors"})


def test_keeping_is_refused_before_the_work(section, refuses):
    class Own:
        name, dim, input_size, patch_um = "own", 3, 8, 10.0

        def __call__(self, _):
            raise AssertionError("no patch should be described")

    with refuses(section, ValueError, "keep_weights=True: encoder 'own' exports no weights"):
        sthisto.pp.extract_features(section, Own(), keep_weights=True)


def test_the_handcrafted_encoder_needs_no_weights_to_come_back(section):
    sthisto.pp.extract_features(section, keep_weights=True)
    made = section.uns["sthisto"]["features"]["X_histo"]
    assert "provenance" not in made
    assert encoders.restore(made).name == "handcrafted"


def test_dense_features_of_a_network(file, tiny, section):
    sthisto.pp.extract_features(section, encoders.load("tiny", weights=file), dense=True)
    assert section.obsm["X_histo"].shape == (section.n_obs, 64)
    assert section.uns["sthisto"]["features"]["X_histo"]["provenance"]["stride"] == 16


def test_cut_logs_stay_quiet(file, tiny, caplog):
    caplog.set_level(logging.WARNING)
    encoders.load("tiny", weights=file)(patches())
    assert caplog.text == ""


def test_precision_is_left_to_the_device():
    assert _network.default_precision(torch.device("cpu")) == "float32"
