"""Public sections: a server on loopback serves tiny files of the public layout, whole, cut, wrong, or not at all."""

import json
import tarfile
import warnings
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import sthisto
from sthisto.datasets import _download, _public, breast_cancer, breast_dcis, dlpfc, mouse_brain, synthetic
from sthisto.datasets._download import data_folder, fetch, part_of

with warnings.catch_warnings(action="ignore"):  # of docrep, when squidpy is loaded
    import squidpy  # noqa: F401

S3, PILOT, TEN_X = (
    f"{address.removeprefix('https://')}" for address in (_public.SPATIAL_LIBD, _public.HUMAN_PILOT, _public.TEN_X)
)
SECTIONS = {mouse_brain: "V1_Adult_Mouse_Brain", breast_cancer: _public.BREAST_CANCER, breast_dcis: _public.BREAST_DCIS}


class Server(ThreadingHTTPServer):
    """Serves files by path; ``cuts`` bytes are sent of each answer, after which the connection is dropped."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.files, self.asked = {}, []
        self.cuts, self.ranges, self.tags = None, True, True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        """Say nothing of connections that a test drops."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        server.asked.append((path, self.headers.get("Range")))
        if path not in server.files:
            return self.send_error(404)
        whole = server.files[path]
        tag = f'"{sha256(whole).hexdigest()}"'
        begin = self.first_byte(tag)
        if begin >= len(whole) > 0 and begin:
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(whole) - begin))
        if server.tags:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(whole[begin:] if server.cuts is None else whole[begin : begin + server.cuts])
        return self.wfile.flush()

    def first_byte(self, tag):
        asked = self.headers.get("Range")
        fresh = self.headers.get("If-Range", tag) == tag
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges and fresh else 0

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def server():
    with Server(Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def write_counts(path, adata, name):
    """As Space Ranger writes ``filtered_feature_bc_matrix.h5``: genes by spots, compressed by columns."""
    counts = adata.layers["counts"].tocsr()
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([name.encode()])
        file.attrs["chemistry_description"] = "Spatial 3' v1"
        matrix = file.create_group("matrix")
        matrix["barcodes"] = adata.obs_names.to_numpy().astype("S")
        matrix["data"], matrix["indices"], matrix["indptr"] = counts.data.astype("i4"), counts.indices, counts.indptr
        matrix["shape"] = np.array(counts.shape[::-1], "i4")
        genes = matrix.create_group("features")
        symbols = ["TWIN", "TWIN", *adata.var_names[2:]]  # as in every annotation
        for key, values in {
            "id": [f"ENSG{i:011d}" for i in range(adata.n_vars)],
            "name": symbols,
            "feature_type": ["Gene Expression"] * adata.n_vars,
            "genome": ["GRCh38"] * adata.n_vars,
        }.items():
            genes[key] = np.array(values, "S")


def positions_table(adata):
    """Every spot of the array, those beside the tissue too, without a header."""
    xy = np.rint(adata.obsm["spatial"]).astype(int)
    rows = [
        f"{name},1,{row},{col},{y},{x}"
        for name, row, col, (x, y) in zip(
            adata.obs_names, adata.obs["array_row"], adata.obs["array_col"], xy, strict=True
        )
    ]
    return "\n".join(["TTTTTTTTTTTTTTTT-1,0,0,0,3,3", *rows, ""])


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Files of one small section by their names, and the section itself."""
    home = tmp_path_factory.mktemp("layout")
    adata = synthetic(60, n_genes=12, mpp=4.0, random_state=4)
    adata.obs_names = ["".join("ACGT"[i // 4**k % 4] for k in range(16)) + "-1" for i in range(adata.n_obs)]
    picture = adata.uns["spatial"]["synthetic_0"]["images"]["hires"]
    hires = np.asarray(Image.fromarray(picture).resize((picture.shape[1] // 2, picture.shape[0] // 2)))
    factor = hires.shape[1] / picture.shape[1]
    scales = {"tissue_hires_scalef": factor, "tissue_lowres_scalef": factor / 2, "spot_diameter_fullres": 14.0}
    write_counts(home / "counts.h5", adata, "tiny")
    tifffile.imwrite(home / "image.tif", picture, photometric="rgb", tile=(128, 128))
    Image.fromarray(hires).save(home / "hires.png")
    Image.fromarray(hires[::2, ::2]).save(home / "lowres.png")
    (home / "scales.json").write_text(json.dumps(scales))
    (home / "positions.csv").write_text(positions_table(adata))
    with tarfile.open(home / "spatial.tar.gz", "w:gz") as archive:
        for name, inside in {
            "hires.png": "tissue_hires_image.png",
            "lowres.png": "tissue_lowres_image.png",
            "scales.json": "scalefactors_json.json",
            "positions.csv": "tissue_positions_list.csv",
        }.items():
            archive.add(home / name, f"spatial/{inside}")
    return adata, {path.name: path.read_bytes() for path in home.iterdir()}


@pytest.fixture
def cortex(server, layout, monkeypatch):
    """The server has section 151673, with as many spots as the tiny section has."""
    adata, files = layout
    labels = [f"{name}\t151673\t{'WM' if i % 2 else 'L1'}" for i, name in enumerate(adata.obs_names[:-5])]
    server.files = {
        f"{S3}/h5/151673_filtered_feature_bc_matrix.h5": files["counts.h5"],
        f"{S3}/images/151673_tissue_hires_image.png": files["hires.png"],
        f"{S3}/images/151673_tissue_lowres_image.png": files["lowres.png"],
        f"{S3}/images/151673_full_image.tif": files["image.tif"],
        f"{PILOT}/151673/tissue_positions_list.txt": files["positions.csv"],
        f"{PILOT}/151673/scalefactors_json.json": files["scales.json"],
        f"{PILOT}/barcode_level_layer_map.tsv": "\n".join([*labels, f"{adata.obs_names[-1]}\t151507\tL6"]).encode(),
    }
    monkeypatch.setitem(_public.SPOTS, "151673", adata.n_obs)
    return server


@pytest.fixture
def breast(server, layout, monkeypatch):
    """The server has the three sections of 10x, with the checksums of what it serves."""
    _, files = layout
    for name in SECTIONS.values():
        served = {
            "filtered_feature_bc_matrix.h5": files["counts.h5"],
            "spatial.tar.gz": files["spatial.tar.gz"],
            "image.tif": files["image.tif"],
        }
        server.files |= {f"{TEN_X}/{name}/{name}_{file}": content for file, content in served.items()}
        sums = {file: sha256(content).hexdigest() for file, content in served.items()}
        monkeypatch.setitem(_public.SHA256, name, sums)
    return server


@pytest.fixture
def load(cortex, tmp_path):
    return partial(dlpfc, folder=tmp_path, base_url=cortex.url, progress=False)


def test_a_section_of_the_cortex_is_whole(load, layout, tmp_path):
    truth, _ = layout
    adata = load()
    assert list(adata.obs_names) == list(truth.obs_names)
    assert_array_equal(adata.obsm["spatial"], np.rint(truth.obsm["spatial"]))
    assert_array_equal(adata.layers["counts"].toarray(), truth.layers["counts"].toarray())
    assert_allclose(adata.X.toarray(), truth.X.toarray(), rtol=1e-5)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.var_names.is_unique
    assert list(adata.var_names[:2]) == ["TWIN", "TWIN-1"]
    assert adata.var["gene_ids"].iloc[1] == "ENSG00000000001"
    assert adata.obs["layer"].cat.categories.tolist() == ["L1", "L6", "WM"]
    assert adata.obs["layer"].isna().sum() == 5  # a label of another section is not taken
    entry = adata.uns["spatial"]["151673"]
    assert entry["metadata"]["source_image_path"] == str(tmp_path / "dlpfc" / "151673" / "image.tif")
    assert set(entry["images"]) == {"hires", "lowres"}


def test_it_goes_straight_into_features_fit_and_file(load, encoder, tmp_path):
    adata = load()
    sthisto.pp.extract_features(adata, encoder)
    record = adata.uns["sthisto"]["features"]["X_histo"]
    assert record["image"].tolist() == [str(tmp_path / "dlpfc" / "151673" / "image.tif")]  # not the hires picture
    assert record["mpp"] == pytest.approx(4, rel=0.01)
    sthisto.tl.fit(adata, "ridge")
    adata.write_h5ad(tmp_path / "section.h5ad")


def test_without_the_full_resolution_image_the_small_one_is_taken(load, cortex, encoder):
    adata = load(fullres=False)
    assert not any("full_image" in path for path, _ in cortex.asked)
    sthisto.pp.extract_features(adata, encoder)
    assert adata.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["uns:hires"]


def test_an_image_that_was_moved_away_is_told_of(load, encoder, tmp_path, caplog):
    adata = load()
    (tmp_path / "dlpfc" / "151673" / "image.tif").unlink()
    with caplog.at_level("INFO", "sthisto"):
        sthisto.pp.extract_features(adata, encoder)
    assert "does not exist" in caplog.text
    assert adata.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["uns:hires"]


def test_what_is_there_is_not_asked_for_again(load, cortex):
    first = load()
    n = len(cortex.asked)
    assert n == len(cortex.files)
    second = load(base_url="http://127.0.0.1:9")
    assert len(cortex.asked) == n
    assert (first.X != second.X).nnz == 0


@pytest.mark.parametrize("function", SECTIONS, ids=SECTIONS.values())
def test_sections_of_10x(function, breast, layout, tmp_path):
    truth, _ = layout
    adata = function(folder=tmp_path, base_url=breast.url, progress=False)
    name = SECTIONS[function]
    assert list(adata.uns["spatial"]) == [name]
    assert_allclose(adata.X.toarray(), truth.X.toarray(), rtol=1e-5)
    assert "layer" not in adata.obs
    n = len(breast.asked)
    (tmp_path / name / "spatial.tar.gz").unlink()  # it has been unpacked
    function(folder=tmp_path, base_url=breast.url, progress=False)
    assert len(breast.asked) == n


def test_folder_and_mirror_come_from_the_environment(cortex, tmp_path, monkeypatch):
    monkeypatch.setenv("STHISTO_DATA", str(tmp_path / "kept"))
    monkeypatch.setenv("STHISTO_DATA_URL", cortex.url + "/")
    dlpfc(fullres=False, progress=False)
    assert (tmp_path / "kept" / "dlpfc" / "151673" / "filtered_feature_bc_matrix.h5").exists()
    assert data_folder(None) == tmp_path / "kept"
    monkeypatch.delenv("STHISTO_DATA")
    assert data_folder(None).name == "sthisto"
    assert data_folder("~/data") == Path.home() / "data"


def test_public_addresses():
    """The addresses that the publishers document, for who has a network."""
    assert _public._mirrored(f"{_public.HUMAN_PILOT}/151507/x", None) == (
        "https://raw.githubusercontent.com/LieberInstitute/HumanPilot/master/10X/151507/x"
    )
    assert sum(_public.SPOTS.values()) == 47681  # as spatialLIBD counts them
    assert all(len(each) == 64 for sums in _public.SHA256.values() for each in sums.values())


# --- downloads -----------------------------------------------------------------------------------------------------


@given(size=st.integers(0, 5000), cut=st.integers(1, 5000), ranges=st.booleans(), tags=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_download_goes_on_and_gives_the_same_bytes(server, tmp_path, size, cut, ranges, tags):
    content = np.random.default_rng(size).bytes(size)
    server.files, server.cuts, server.ranges, server.tags = {"file": content}, None, ranges, tags
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    part_of(path).write_bytes(content[:cut])  # of an earlier call
    assert fetch(f"{server.url}/file", path, progress=False).read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_cuts_are_mended_within_a_call(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "BLOCK", 100)
    server.files, server.cuts = {"file": bytes(range(200)) * 10}, 600
    path = fetch(f"{server.url}/file", tmp_path / "file", progress=False)
    assert path.read_bytes() == server.files["file"]
    assert [begin for _, begin in server.asked] == [None, "bytes=600-", "bytes=1200-", "bytes=1800-"]


def test_what_came_is_kept_when_nothing_more_comes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "BLOCK", 100)
    server.files, server.cuts, server.ranges = {"file": bytes(2000)}, 600, False
    path = tmp_path / "file"
    with pytest.raises(ConnectionError, match=r"600 bytes are kept.*put the file at"):
        fetch(f"{server.url}/file", path, progress=False)
    assert part_of(path).stat().st_size == 600
    assert not path.exists()
    server.cuts, server.ranges = None, True
    assert fetch(f"{server.url}/file", path, progress=False).read_bytes() == bytes(2000)
    assert server.asked[-1] == ("file", "bytes=600-")


def test_a_file_that_changed_meanwhile_is_begun_anew(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "BLOCK", 100)
    server.files, server.cuts, server.ranges = {"file": b"old" * 500}, 600, False
    path = tmp_path / "file"
    with pytest.raises(ConnectionError):
        fetch(f"{server.url}/file", path, progress=False)
    server.files, server.cuts, server.ranges = {"file": b"new" * 500}, None, True
    assert fetch(f"{server.url}/file", path, progress=False).read_bytes() == b"new" * 500


def test_a_wrong_checksum_is_refused_and_thrown_away(server, tmp_path):
    server.files = {"file": b"something else"}
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="hash of downloaded file"):
        fetch(f"{server.url}/file", path, sha256=sha256(b"the file").hexdigest(), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_names_its_address_and_place(load, cortex, tmp_path):
    del cortex.files[f"{S3}/h5/151673_filtered_feature_bc_matrix.h5"]
    kept = tmp_path / "dlpfc" / "151673" / "filtered_feature_bc_matrix.h5"
    with pytest.raises(OSError, match="404") as caught:
        load()
    assert str(kept) in str(caught.value)
    assert "/h5/151673_filtered_feature_bc_matrix.h5" in str(caught.value)


def test_without_network_the_error_says_what_to_put_where(load, tmp_path):
    with pytest.raises(ConnectionError, match="Without network, download that address elsewhere") as caught:
        load(base_url="http://127.0.0.1:9")
    assert str(tmp_path / "dlpfc" / "barcode_level_layer_map.tsv") in str(caught.value)


# --- wrong content -------------------------------------------------------------------------------------------------


def test_an_unknown_section_names_the_twelve():
    with pytest.raises(KeyError, match="151508") as caught:
        dlpfc("151600")
    assert all(section in str(caught.value) for section in _public.SPOTS)


def test_too_few_spots_are_refused(load, monkeypatch):
    monkeypatch.setitem(_public.SPOTS, "151673", 3639)
    with pytest.raises(ValueError, match="has 60 spots, but section 151673 has 3639"):
        load()


def test_positions_of_another_section_are_refused(load, cortex):
    name = f"{PILOT}/151673/tissue_positions_list.txt"
    cortex.files[name] = b"\n".join(cortex.files[name].splitlines()[:-7]) + b"\n"
    with pytest.raises(ValueError, match=r"7 of 60 spots .* have no place"):
        load()


def test_an_image_of_another_shape_is_refused(load, cortex, tmp_path):
    tifffile.imwrite(tmp_path / "other.tif", np.zeros((300, 300, 3), np.uint8), photometric="rgb")
    cortex.files[f"{S3}/images/151673_full_image.tif"] = (tmp_path / "other.tif").read_bytes()
    with pytest.raises(ValueError, match=r"300 x 300 px, which .* another section"):
        load()


def test_labels_of_other_sections_alone_are_refused(load, cortex):
    cortex.files[f"{PILOT}/barcode_level_layer_map.tsv"] = b"AAAC-1\t151507\tL1\n"
    with pytest.raises(ValueError, match="no labels for section 151673"):
        load()


def test_progress_is_shown_on_request(server, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(_download, "progress_bar", lambda **options: shown.append(options) or _Bar())
    server.files = {"file": bytes(100)}
    fetch(f"{server.url}/file", tmp_path / "a", progress=True)
    fetch(f"{server.url}/file", tmp_path / "b", progress=False)
    assert [(each["total"], each["shown"]) for each in shown] == [(100, True), (100, False)]


class _Bar:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing to close."""

    def update(self, n):
        assert n > 0


def test_olfactory_bulb_reads_the_selected_spots(tmp_path):
    home = tmp_path / "olfactory_bulb"
    home.mkdir()
    (home / "MOB1.tsv").write_text("\tgene_a\tgene_b\n3x5\t1\t0\n4x6\t2\t8\n5x7\t9\t9\n")
    header = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
    rows = "5\t7\t5\t7\t50\t70\t0\n4\t6\t4\t6\t41\t60.5\t1\n3\t5\t3\t5\t30\t50\t1\n9\t9\t9\t9\t9\t9\t1\n"
    (home / "alignment_table_MOB1.tsv").write_text(header + rows)
    Image.fromarray(np.full((80, 60, 3), 200, np.uint8)).save(home / "MOB1.jpg")
    adata = sthisto.datasets.olfactory_bulb("MOB1", folder=tmp_path)
    assert list(adata.obs_names) == ["4x6", "3x5"]  # not selected, or without counts: left out
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), [[2, 8], [1, 0]])
    np.testing.assert_allclose(adata.X.toarray(), np.log1p([[2000, 8000], [10000, 0]]))
    np.testing.assert_array_equal(adata.obsm["spatial"], [[41, 60.5], [30, 50]])
    assert adata.uns["spatial"]["MOB1"]["images"]["hires"].shape == (80, 60, 3)


def test_olfactory_bulb_names_the_sections_it_has():
    with pytest.raises(KeyError, match="MOB1, MOB2"):
        sthisto.datasets.olfactory_bulb("MOB9")
