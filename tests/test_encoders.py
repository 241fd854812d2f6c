"""Encoders: the laws every entry keeps, and the hand-crafted features against independent references."""

import sys
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.ndimage import correlate1d, maximum_filter, uniform_filter
from scipy.spatial import KDTree
from skimage.color import separate_stains
from skimage.draw import disk
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from sthisto import encoders
from sthisto.encoders import ENCODERS, EncoderSpec, handcrafted
from sthisto.encoders._encode import encode
from sthisto.images import open_image

OFFLINE = sorted(name for name, spec in ENCODERS.items() if spec.weights is None)
TISSUE = np.array([225, 180, 205], np.uint8)
NUCLEUS = np.array([90, 60, 130], np.uint8)


def tissue(n, random_state=0, side=256):
    """Patches with structure at several scales."""
    rng = np.random.default_rng(random_state)
    coarse = rng.integers(60, 230, (n, side // 32, side // 32, 3)).repeat(32, 1).repeat(32, 2)
    return np.clip(coarse + rng.integers(-25, 26, (n, side, side, 3)), 0, 255).astype(np.uint8)


def drawn(centers, radius=4):
    """One patch of plain tissue with round nuclei at (row, column)."""
    patch = np.empty((1, 256, 256, 3), np.uint8)
    patch[:] = TISSUE
    for centre in centers:
        patch[0][disk(centre, radius, shape=(256, 256))] = NUCLEUS
    return patch


def features(patches):
    """Columns of the hand-crafted encoder by name."""
    encoder = encoders.load("handcrafted")
    return dict(zip(encoder.names, encoder(patches).T, strict=True))


def densities(patches):
    """Optical density of RGB, by hand."""
    return -np.log10((patches.astype(float) + 1) / 256)


def halved(patches):
    """The whole patch at half sampling, by hand."""
    n, side = patches.shape[:2]
    return patches.reshape(n, side // 2, 2, side // 2, 2, 3).mean((2, 4))


def centered(maps, side):
    """The centered window of maps (n, h, w, ...)."""
    low = (maps.shape[1] - side) // 2
    return maps[:, low : low + side, low : low + side]


def stained(patches):
    """Maps (7, n, h, w) of optical density at the patches' own sampling."""
    maps = np.empty((7, *patches.shape[:3]), np.float32)
    handcrafted.stains(np.moveaxis(patches, 3, 0).astype(np.uint16) * 4, maps)
    return maps


@pytest.fixture(params=OFFLINE, scope="module")
def encoder(request):
    return encoders.load(request.param)


# Laws of every entry


def test_output_is_what_the_registry_says(encoder):
    spec = ENCODERS[encoder.name]
    assert (encoder.dim, encoder.input_size, encoder.patch_um) == (spec.dim, spec.input_size, spec.patch_um)
    for n in (0, 1, 3):
        rows = encoder(tissue(n, side=encoder.input_size))
        assert rows.shape == (n, spec.dim)
        assert rows.dtype == np.float32


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(19)), cut=st.integers(1, 18))
def test_a_row_depends_on_its_own_patch_alone(encoder, order, cut):
    patches = tissue(19, side=encoder.input_size)
    together = encoder(patches)
    shuffled = patches[order]
    apart = np.concatenate([encoder(shuffled[:cut]), encoder(shuffled[cut:])])
    np.testing.assert_array_equal(apart, together[order])


def test_a_patch_alone_and_a_second_call_give_the_same_bits(encoder):
    patches = tissue(17, side=encoder.input_size)
    together = encoder(patches)
    assert together.tobytes() == encoder(patches.copy()).tobytes()
    alone = np.concatenate([encoder(patch[None]) for patch in patches])
    assert together.tobytes() == alone.tobytes()


def test_memory_layout_does_not_matter(encoder):
    patches = tissue(3, side=encoder.input_size)
    planes_first = np.ascontiguousarray(patches.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(encoder(planes_first), encoder(patches))


def test_different_patches_give_different_rows(encoder):
    assert len(np.unique(encoder(tissue(6, side=encoder.input_size)), axis=0)) == 6


def test_global_random_state_is_left_alone(encoder):
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    patches = tissue(2, side=encoder.input_size)
    first = encoder(patches)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    np.testing.assert_array_equal(encoder(patches), first)


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 180), (255, 0, 0)])
def test_plain_patches_give_finite_values(encoder, color):
    plain = np.full((1, encoder.input_size, encoder.input_size, 3), color, np.uint8)
    assert np.isfinite(encoder(plain)).all()


def test_patches_are_not_written_to(encoder):
    patches = tissue(2, side=encoder.input_size)
    patches.flags.writeable = False
    encoder(patches)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 64, 64, 3), np.uint8), ((2, 256, 256, 4), np.uint8), ((256, 256, 3), np.uint8), ((2, 256, 256, 3), float)],
)
def test_other_patches_are_refused(encoder, shape, dtype):
    with pytest.raises(ValueError, match=rf"uint8 .* \(n, {encoder.input_size}, {encoder.input_size}, 3\); found"):
        encoder(np.zeros(shape, dtype))


# Finding an encoder


@dataclass
class Own:
    """An encoder of one's own: the mean color."""

    name: object = "own"
    dim: int = 3
    input_size: int = 16
    patch_um: float = 50.0

    def __call__(self, patches):
        return patches.mean((1, 2)).astype(np.float32)


def test_an_object_of_the_contract_is_taken_as_it_is():
    own = Own()
    assert encoders.load(own) is own


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(KeyError, match=r"no encoder 'unicorn'.*handcrafted"):
        encoders.load("unicorn")


def test_what_an_object_lacks_is_named():
    with pytest.raises(TypeError, match=r"Own\(.*is no encoder; wrong or absent: name \(None\)\..*handcrafted"):
        encoders.load(Own(name=None))
    with pytest.raises(TypeError, match=r"7 is no encoder.*dim \('absent'\).*__call__\."):
        encoders.load(7)


def test_a_class_instead_of_an_instance_is_refused():
    with pytest.raises(TypeError, match=r"Own'> is no encoder; wrong or absent: __call__.*an instance"):
        encoders.load(Own)


@pytest.mark.parametrize("option", ["weights", "device", "threads"])
def test_options_beside_an_object_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} given with an encoder object"):
        encoders.load(Own(), **{option: "cpu"})


def test_the_handcrafted_encoder_has_no_weights_and_no_unknown_options():
    with pytest.raises(ValueError, match="has no weights"):
        encoders.load("handcrafted", weights="uni.safetensors")
    with pytest.raises(TypeError, match="'handcrafted' takes threads and batch_size; found pooling, revision"):
        encoders.load("handcrafted", revision="main", pooling="mean")


@pytest.mark.parametrize("option", ["batch_size", "threads"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_counts_are_positive_whole_numbers(option, value):
    with pytest.raises(ValueError, match=f"{option} has to be a positive whole number; found {value!r}"):
        encoders.load("handcrafted", **{option: value})


def test_the_batch_size_is_the_encoders():
    assert encoders.load("handcrafted").batch_size == 64
    assert encoders.load("handcrafted", batch_size=np.int64(5)).batch_size == 5
    assert encoders.restore({"encoder": "handcrafted"}, batch_size=3).batch_size == 3
    middle = Middle()
    points = np.ones((70, 2))
    encode(open_image(np.zeros((9, 9))), points, 16, middle)
    middle.batch_size = 50
    encode(open_image(np.zeros((9, 9))), points, 16, middle)
    assert middle.seen == [64, 6, 50, 20]
    middle.batch_size = 0
    with pytest.raises(ValueError, match="batch_size has to be a positive"):
        encode(open_image(np.zeros((9, 9))), points, 16, middle)


def test_a_spec_passes_name_and_options_to_its_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "encoders_elsewhere", sys.modules[__name__])
    spec = EncoderSpec(source="encoders_elsewhere:build_own", dim=3, license="none", reference="none")
    monkeypatch.setitem(ENCODERS, "own", spec)
    own = encoders.load("own", weights="a.safetensors", device="cpu", pooling="mean")
    assert own.name == ("own", spec, "a.safetensors", "cpu", "mean")


def build_own(name, spec, *, weights, device, pooling):
    return Own(name=(name, spec, weights, device, pooling))


# Encoding around points


class Middle(Own):
    """The color in the middle, and a record of what it was asked."""

    def __call__(self, patches):
        self.seen = [*getattr(self, "seen", []), len(patches)]
        return patches[:, 8, 8].astype(np.float32)


@pytest.mark.parametrize("stored", [np.asarray, lambda pixels: zarr.array(pixels, chunks=(7, 9, 3))])
def test_every_point_gets_the_features_of_its_own_patch(stored):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    row, column = np.random.default_rng(1).permutation(60 * 80)[:101] // 80, np.arange(101) % 80
    encoder = Middle()
    found = encode(open_image(stored(pixels)), np.column_stack([column, row]).astype(float), 16, encoder, batch_size=25)
    np.testing.assert_array_equal(found, pixels[row, column])
    assert encoder.seen == [25, 25, 25, 25, 1]


def test_no_points_have_no_features():
    assert encode(open_image(np.zeros((9, 9))), np.empty((0, 2)), 16, Own()).shape == (0, 3)


def test_features_of_another_shape_than_said_are_refused():
    with pytest.raises(ValueError, match=r"'own' gave features of shape \(2, 3\) for 2 patches; expected \(2, 4\)"):
        encode(open_image(np.zeros((9, 9))), np.ones((2, 2)), 16, Own(dim=4))


def test_what_goes_wrong_in_the_picture_comes_out():
    with pytest.raises(ValueError, match=r"be in \[0, 1\]"):
        encode(open_image(np.full((9, 9), 7.0)), np.ones((2, 2)), 16, Own())


# The hand-crafted features


def test_names_are_distinct_and_one_a_column():
    encoder = encoders.load("handcrafted")
    assert len(set(encoder.names)) == len(encoder.names) == encoder.dim


def test_threads_do_not_change_the_bits():
    patches = tissue(40)
    one, many = (encoders.load("handcrafted", threads=n)(patches) for n in (1, 5))
    assert one.tobytes() == many.tobytes()


@pytest.mark.parametrize("turn", [1, 2, 3, "mirror"])
def test_quarter_turns_and_mirrors_change_nothing(turn):
    patches = tissue(4, random_state=1)
    turned = patches[:, :, ::-1] if turn == "mirror" else np.rot90(patches, turn, axes=(1, 2))
    encoder = encoders.load("handcrafted")
    np.testing.assert_allclose(encoder(turned), encoder(patches), rtol=1e-4, atol=2e-4)


def test_stains_agree_with_scikit_image():
    patches = tissue(2)
    red, green, blue, chroma, haematoxylin, eosin, darkness = stained(patches)
    density = densities(patches)
    np.testing.assert_allclose(np.stack([red, green, blue], -1), density, atol=1e-6)
    np.testing.assert_allclose(chroma, np.ptp(density, axis=-1), atol=1e-6)
    np.testing.assert_allclose(darkness, density.mean(-1), atol=1e-6)
    pure = handcrafted.HAEMATOXYLIN_EOSIN / np.linalg.norm(handcrafted.HAEMATOXYLIN_EOSIN, axis=1, keepdims=True)
    third = np.cross(*pure)
    unmix = np.linalg.inv(np.vstack([pure, third / np.linalg.norm(third)]))
    # scikit-image measures density in units of log(1e-6) and cuts at 0
    reference = separate_stains((patches.astype(float) + 1) / 256, unmix) * 6
    np.testing.assert_allclose(np.maximum(haematoxylin, 0), reference[..., 0], atol=1e-5)
    np.testing.assert_allclose(np.maximum(eosin, 0), reference[..., 1], atol=1e-5)


def test_pure_stains_are_told_apart():
    for stain, other, vector in zip(
        ("haematoxylin", "eosin"), ("eosin", "haematoxylin"), handcrafted.HAEMATOXYLIN_EOSIN, strict=True
    ):
        color = np.round(256 * 10 ** (-0.5 * vector / np.linalg.norm(vector)) - 1)
        found = features(np.full((1, 256, 256, 3), color, np.uint8))
        assert found[f"mean_{stain}_512"] == pytest.approx(0.5, abs=0.01)
        assert found[f"mean_{other}_512"] == pytest.approx(0, abs=0.01)


def test_means_and_deviations_are_those_of_the_windows():
    patches = tissue(3)
    found = features(patches)
    for um, window in [(um, centered(densities(patches), um // 2)) for um in (32, 64, 128, 256)] + [
        (512, densities(halved(patches)))
    ]:
        for c, color in enumerate(("red", "green", "blue")):
            np.testing.assert_allclose(found[f"mean_{color}_{um}"], window[..., c].mean((1, 2)), rtol=1e-4)
            np.testing.assert_allclose(found[f"deviation_{color}_{um}"], window[..., c].std((1, 2)), rtol=1e-3)
        np.testing.assert_allclose(found[f"mean_chroma_{um}"], np.ptp(window, axis=-1).mean((1, 2)), rtol=1e-4)


def test_gradients_are_numpys():
    patches = tissue(2)
    darkness = centered(densities(patches), 128).mean(-1)
    slope = np.hypot(*np.gradient(darkness, axis=(1, 2)))
    np.testing.assert_allclose(features(patches)["gradient_darkness_128"], centered(slope, 64).mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("cell", [1, 2, 4, 8, 16])
def test_contrast_of_a_chessboard_is_at_the_size_of_its_cells(cell):
    light = (np.add.outer(np.arange(256) // cell, np.arange(256) // cell) % 2).astype(bool)
    found = features(np.where(light, 220, 120).astype(np.uint8)[None, :, :, None].repeat(3, axis=3))
    detail = np.array([found[f"contrast_darkness_middle_{2**k}"][0] for k in range(5)])
    assert detail.argmax() in {np.log2(cell), np.log2(max(cell, 2)) - 1}  # blocks overlap, some lie across borders
    finer = 2 ** np.arange(5) < min(cell, 4)
    np.testing.assert_allclose(detail[finer], 0, atol=1e-3)
    assert np.sqrt((detail**2).sum()) == pytest.approx(np.log10(221 / 121) / 2, rel=0.01)


def test_contrast_is_the_power_lost_from_blocks_to_blocks_twice_as_large():
    patches = tissue(2)
    found = features(patches)
    for where, view in (("middle", centered(densities(patches), 128)), ("whole", densities(halved(patches)))):
        power = []
        for side in (1, 2, 4, 8, 16, 32):
            blocks = sliding_window_view(view.mean(-1), (side, side), axis=(1, 2)).mean((3, 4))
            step = min(side, 4)
            power.append((blocks[:, ::step, ::step] ** 2).mean((1, 2)))
        for k in range(5):
            lost = found[f"contrast_darkness_{where}_{2**k}"] ** 2
            np.testing.assert_allclose(lost, np.maximum(power[k] - power[k + 1], 0), atol=2e-6)


def test_asymmetry_is_the_root_of_the_difference_between_halves():
    patch = np.full((1, 256, 256, 3), 220, np.uint8)
    patch[:, :, 128:] = 120
    found = features(patch)
    assert found["asymmetry_darkness"][0] == pytest.approx(np.sqrt(np.log10(221 / 121)), rel=1e-3)
    assert features(np.full_like(patch, 120))["asymmetry_darkness"][0] == pytest.approx(0, abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(random_state=st.integers(0, 2**32 - 1), radius=st.integers(1, 3))
def test_binary_patterns_follow_their_definition(random_state, radius):
    maps = np.random.default_rng(random_state).integers(0, 4, (1, 9, 9)).astype(np.float32)
    code = handcrafted.binary_patterns(maps, radius, 0.5)[0]
    clockwise = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for (y, x), value in np.ndenumerate(code):
        centre = maps[0, y + radius, x + radius]
        ring = [maps[0, y + radius + dy * radius, x + radius + dx * radius] > centre for dy, dx in clockwise]
        runs = sum(ring[k] != ring[k - 1] for k in range(8))
        assert value == (sum(ring) if runs <= 2 else 9)


def test_binary_patterns_agree_with_scikit_image_on_blocks():
    # scikit-image interpolates the diagonal neighbors, which changes nothing where values are constant around them
    maps = np.kron(np.random.default_rng(0).integers(0, 2, (12, 12)), np.ones((8, 8))).astype(np.float32)
    ours = handcrafted.binary_patterns(maps[None], 1, 0.0)[0]
    theirs = local_binary_pattern(maps.astype(np.uint8), 8, 1, method="uniform")[1:-1, 1:-1]
    flat = ours == 8
    assert 0.2 < flat.mean() < 0.9
    np.testing.assert_array_equal(flat[maps[1:-1, 1:-1] == 1], theirs[maps[1:-1, 1:-1] == 1] == 8)


@pytest.mark.parametrize("distance", [2, 8])
def test_correlation_of_levels_is_scikit_images_but_for_its_constant(distance):
    levels = np.random.default_rng(0).integers(0, 8, (4, 60, 64)).astype(np.uint8)
    levels[1] = levels[1] // 4 * 3
    levels[2] = np.arange(64) // 8
    levels[3] = 5
    for image, found in zip(levels, handcrafted.correlation(levels.astype(np.float32), distance), strict=True):
        pairs = graycomatrix(image, [distance], [0, np.pi / 2], levels=8, symmetric=True).sum(3, keepdims=True)
        share = pairs[:, :, 0, 0].sum(0) / pairs.sum()
        variance = (share * (np.arange(8) - (share * np.arange(8)).sum()) ** 2).sum()
        reference = graycoprops(pairs / pairs.sum(), "correlation")[0, 0] * variance / (variance + 0.05)
        assert found == pytest.approx(reference, rel=1e-6, abs=1e-7)


def test_levels_are_equal_steps_of_the_root_of_haematoxylin():
    patches = tissue(2)
    levels = np.minimum(np.floor(np.sqrt(np.clip(stained(centered(patches, 128))[4], 0, 1)) * 8), 7)
    found = features(patches)
    for distance in (2, 8):
        np.testing.assert_array_equal(found[f"cooccurrence_{distance}"], handcrafted.correlation(levels, distance))


@pytest.mark.parametrize(("count", "step"), [(1, 20), (3, 30), (6, 18), (9, 12)])
def test_drawn_nuclei_are_counted_and_their_spacing_measured(count, step):
    places = [128 + step * (k - (count - 1) / 2) for k in range(count)]
    found = features(drawn([(round(y), round(x)) for y in places for x in places]))
    assert found["nuclei_density_256"][0] ** 2 * 128**2 == pytest.approx(count**2, rel=1e-4)
    if count > 1:
        assert np.exp(found["nuclei_spacing"][0]) == pytest.approx(step, rel=0.05)
    assert found["nuclei_area"][0] == pytest.approx(count**2 * np.pi * 16 / 128**2, rel=0.7)


@settings(max_examples=15, deadline=None)
@given(random_state=st.integers(0, 2**32 - 1))
def test_scattered_nuclei_are_found_where_they_were_drawn(random_state):
    rng = np.random.default_rng(random_state)
    places = np.empty((0, 2), int)
    for candidate in rng.integers(72, 184, (60, 2)):
        if not len(places) or np.hypot(*(places - candidate).T).min() >= 14:
            places = np.vstack([places, candidate])
    centers, above = handcrafted.nuclei(stained(centered(drawn(places), 128))[4])
    found = np.argwhere(centers[0]) + 64
    assert KDTree(found).query(places)[0].max() <= 1.5
    assert len(found) == len(places)
    assert (above[centers] > handcrafted.NUCLEUS).all()


def test_nuclei_are_looked_for_in_stain_smoothed_by_a_binomial():
    haematoxylin = np.random.default_rng(0).random((2, 40, 40), np.float32)
    smooth = haematoxylin.astype(float)
    for axis in (1, 2):
        smooth = correlate1d(smooth, [comb(8, k) / 2**8 for k in range(9)], axis=axis, mode="nearest")
    peak = maximum_filter(smooth, 5, axes=(1, 2), mode="nearest")
    above = smooth - uniform_filter(smooth, 25, axes=(1, 2), mode="nearest")
    centers, found = handcrafted.nuclei(haematoxylin)
    np.testing.assert_allclose(found, above, atol=1e-6)
    np.testing.assert_array_equal(centers, (smooth == peak) & (above > handcrafted.NUCLEUS))


def test_no_nuclei_in_plain_tissue():
    found = features(drawn([]))
    assert found["nuclei_density_256"][0] == 0
    assert found["nuclei_area"][0] == 0
    assert found["nuclei_spacing"][0] == pytest.approx(np.log(128))


def test_tissue_and_glass_of_a_real_section_are_told_apart():
    path = Path(__file__).parents[2] / "shared" / "data" / "mob" / "MOB1.jpg"
    if not path.exists():
        pytest.skip("the real sections are not here")
    with Image.open(path) as picture:
        corner, middle = (
            np.asarray(picture.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR, (x, x, x + 81, x + 81)))
            for x in (10, 900)
        )
    found = features(np.stack([corner, middle]))
    assert found["mean_haematoxylin_512"][1] > found["mean_haematoxylin_512"][0] + 0.02
    assert found["deviation_red_512"][1] > 2 * found["deviation_red_512"][0]
