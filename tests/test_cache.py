"""Features that outlive the run: broken off anywhere they come out to the bit; what was made otherwise is refused."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image as Pillow

from sthisto import datasets, images, pp
from sthisto.encoders import _cache
from sthisto.encoders._encode import encode

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (150, 170, 3), np.uint8)
XY = RNG.uniform(0, 150, (90, 2))


class Blurred:
    """Tokens through a fixed map, in float32 sums whose bits depend on their order; may break off."""

    name, input_size, stride, patch_um, dim, token_dim = "blurred", 32, 4, 64.0, 5, 5

    def __init__(self, lasts=10**9, gain=1.0):
        self.left, self.gain = lasts, gain
        self.map = np.random.default_rng(3).normal(size=(48, 5)).astype(np.float32)
        self.passes = 0

    def tokens(self, patches):
        if len(patches) > 1:  # one is the question who it is
            self.left -= 1
            self.passes += len(patches)
        if self.left < 0:
            raise KeyboardInterrupt
        blocks = patches.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 48)
        own = np.tanh(blocks.astype(np.float32) @ self.map * np.float32(self.gain / 300))
        return own + own.mean(axis=(1, 2), keepdims=True)

    def __call__(self, patches):
        return self.tokens(patches).mean(axis=(1, 2))


@pytest.fixture(autouse=True)
def _write_at_once(monkeypatch):
    monkeypatch.setattr(_cache, "EVERY", 0.0)


@pytest.fixture(params=[None, 11.0], ids=["patches", "dense"])
def window(request):
    return request.param


def run(encoder, path=None, window=None, *, picture=PICTURE, xy=XY, side=32.0, **options):
    image = picture if isinstance(picture, images.Image) else images.open_image(picture)
    return encode(image, xy, side, encoder, **{"window": window, "batch_size": 8, "cache": path, **options})


@pytest.mark.parametrize("chunks", [None, (64, 50, 3)])
def test_a_run_broken_off_anywhere_comes_out_to_the_bit(tmp_path, window, chunks):
    picture = PICTURE if chunks is None else zarr.create_array({}, data=PICTURE, chunks=chunks)
    unbroken = run(Blurred(), window=window, picture=picture)
    for lasts in range(3):
        path = tmp_path / f"cache{lasts}" / "0"
        for _ in range(2):  # twice
            with pytest.raises(KeyboardInterrupt):
                run(Blurred(lasts), path, window, picture=picture)
        whole = Blurred()
        assert_array_equal(run(whole, path, window, picture=picture), unbroken, strict=True)
        alone = Blurred()
        run(alone, window=window, picture=picture)
        assert whole.passes == alone.passes - 16 * lasts  # what was done is not done again


def test_what_is_finished_is_only_read(tmp_path, window):
    first = run(Blurred(), tmp_path / "c" / "0", window)
    again = Blurred(lasts=0)
    assert_array_equal(run(again, tmp_path / "c" / "0", window), first, strict=True)
    assert again.passes == 0


def test_smaller_batches_may_go_on(tmp_path, window):
    """After running out of memory."""
    with pytest.raises(KeyboardInterrupt):
        run(Blurred(3), tmp_path / "c" / "0", window)
    assert_allclose(
        run(Blurred(), tmp_path / "c" / "0", window, batch_size=3), run(Blurred(), window=window), rtol=1e-5, atol=1e-6
    )


def test_it_writes_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "EVERY", 1e9)
    run(Blurred(), tmp_path / "c" / "0")
    group = zarr.open_group(tmp_path / "c" / "0", mode="r")
    assert sorted(group.group_keys()) == ["000000"]  # the end is always written
    assert_array_equal(np.sort(group["000000/rows"][:]), np.arange(len(XY)))


KILLED = """
    import sys, time
    import numpy as np
    sys.path.insert(0, {tests!r})
    from test_cache import Blurred
    from sthisto import datasets, pp
    from sthisto.encoders import _cache
    _cache.EVERY = 0.0

    class Slow(Blurred):
        batch_size = 4

        def tokens(self, patches):
            time.sleep(0.03)
            return super().tokens(patches)

    adata = datasets.synthetic(150, n_genes=10, random_state=4)
    for dense in (False, True):
        cache = {cache!r} + str(dense)
        pp.extract_features(adata, Slow(), dense=dense, cache=cache, key_added=str(dense))
    np.savez({out!r}, **adata.obsm)
"""


def parts(folder):
    return len(list(folder.glob("cache*/0/0*")))


def test_killed_three_times(tmp_path):
    script, out = tmp_path / "run.py", tmp_path / "features.npz"
    paths = {"tests": str(Path(__file__).parent), "cache": str(tmp_path / "cache"), "out": str(out)}
    script.write_text(textwrap.dedent(KILLED).format(**paths))
    rng = np.random.default_rng()  # any moment will do, so any is tried
    for _ in range(3):
        before = parts(tmp_path)
        with subprocess.Popen([sys.executable, script]) as process:
            while parts(tmp_path) < before + 2 and process.poll() is None:  # at work
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    adata = datasets.synthetic(150, n_genes=10, random_state=4)
    for dense in (False, True):
        pp.extract_features(adata, Blurred(), dense=dense)
        assert_array_equal(np.load(out)[str(dense)], adata.obsm["X_histo"], strict=True)


# --- what is refused -------------------------------------------------------------------------------------------------


class Told(Blurred):
    """An encoder that says where its weights come from."""

    def __init__(self, **provenance):
        super().__init__()
        self.provenance = {"sha256": "aa", **provenance}

    def weights_bytes(self):
        return b""


OTHERS = {
    "points": ({"xy": XY + 0.5}, r"points \(was .90, sha256"),
    "side": ({"side": 33.0}, r"side \(was 32.0, is 33.0\)"),
    "window": ({"window": 12.0}, r"window \(was 11.0, is 12.0\)"),
    "patches": ({"window": None}, r"window \(was 11.0, is null\)"),
    "pixels": ({"picture": PICTURE ^ (np.arange(170) == 7)[:, None]}, r"image.pixels \(was"),
    "scale": ({"picture": images.open_image(PICTURE, scale=0.5)}, r"image.scales \(was \[1.0\], is \[0.5\]\)"),
    "encoder": ({"encoder": Blurred(gain=1.1)}, r"encoder.output \(was"),
    "weights": ({"encoder": Told()}, r'encoder.sha256 \(was null, is "aa"\)'),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_of_other_settings_is_refused(tmp_path, name):
    path = tmp_path / "c" / "0"
    first = run(Blurred(), path, 11.0)
    before = sorted(tmp_path.rglob("*"))
    other, message = OTHERS[name]
    given = {"encoder": Blurred(), "window": 11.0} | other
    with pytest.raises(ValueError, match=f"holds features made with other settings: .*{message}.*Give cache= another"):
        run(given.pop("encoder"), path, **given)
    assert sorted(tmp_path.rglob("*")) == before
    assert_array_equal(run(Blurred(), path, 11.0), first)


def test_only_what_differs_is_named(tmp_path):
    run(Told(revision="1", classes=np.arange(1000)), tmp_path / "c" / "0")
    with pytest.raises(
        ValueError, match=r"other settings: encoder.revision .was .1., is .2..; encoder.sha256"
    ) as error:
        run(Told(revision="2", sha256="bb", classes=np.arange(1000)), tmp_path / "c" / "0")
    assert "points" not in str(error.value)
    run(Told(revision="1", classes=np.arange(1000)), tmp_path / "c" / "0")


def test_rounding_is_no_other_encoder(tmp_path):
    first = run(Blurred(), tmp_path / "c" / "0")
    assert_array_equal(run(Blurred(gain=1 + 1e-6), tmp_path / "c" / "0"), first)


@pytest.mark.parametrize("suffix", ["png", "zarr"])
def test_a_picture_that_changed_on_disk(tmp_path, suffix):
    file = tmp_path / f"slide.{suffix}"

    def write(pixels):
        if suffix == "png":
            Pillow.fromarray(pixels).save(file)
        else:
            zarr.create_array(file, data=pixels, overwrite=True)
        return images.open_image(file)

    run(Blurred(), tmp_path / "c" / "0", picture=write(PICTURE))
    run(Blurred(lasts=0), tmp_path / "c" / "0", picture=images.open_image(file))
    with pytest.raises(ValueError, match=r"other settings: .*image.pixels"):
        run(Blurred(), tmp_path / "c" / "0", picture=write(255 - PICTURE))


def test_what_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    zarr.save_array(tmp_path / "array", PICTURE)
    zarr.create_group(tmp_path / "group", attributes={"mine": 1}).create_group("0")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "array", "group"):
        with pytest.raises(ValueError, match=f"{name} is no cache of features"):
            run(Blurred(), tmp_path / name / "0")
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_is_found(tmp_path):
    run(Blurred(), tmp_path / "c" / "0")
    (tmp_path / "c" / "0" / "000002" / "features" / "c" / "0" / "0").unlink()  # zarr reads zeros then
    with pytest.raises(ValueError, match=r"the cache is damaged: .*000002 does not match its checksum. Delete"):
        run(Blurred(), tmp_path / "c" / "0")


def test_two_runs_at_once(tmp_path):
    path = tmp_path / "c" / "0"
    kept = _cache.FeatureCache(path, {})
    other = _cache.FeatureCache(path, {})
    features, rows = np.zeros((3, 2), np.float32), np.arange(3)
    kept.keep(features, rows, 3, last=True)
    with pytest.raises(FileExistsError, match="000000 was written meanwhile by another run"):
        other.keep(features, rows, 3, last=True)


def test_sections_have_a_part_each(sections, tmp_path, refuses):
    options = {"library_key": "library", "cache": tmp_path / "cache"}
    pp.extract_features(sections, Blurred(), **options)
    first = sections.obsm["X_histo"]
    pp.extract_features(sections, Blurred(lasts=0), **options)
    assert_array_equal(sections.obsm["X_histo"], first)
    assert sorted(zarr.open_group(tmp_path / "cache", mode="r").group_keys()) == ["0", "1"]
    sections.obsm["spatial"][-1] += 0.25  # of the second
    with refuses(sections, ValueError, r"1 holds features made with other settings: points"):
        pp.extract_features(sections, Blurred(), **options)
