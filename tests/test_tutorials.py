"""The tutorials run from the first cell to the last, on synthetic sections."""

import base64
import importlib.util
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parents[1] / "tutorials"
TUTORIALS = sorted(HERE.glob("*.ipynb"))


def load_script():
    spec = importlib.util.spec_from_file_location("execute", HERE / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(output):
    """Types of the images of an output."""
    return [kind for kind in output.get("data", {}) if kind.startswith("image/")]


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
# the client's own event loop and sockets are closed when its kernel is, after the test
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestWarning")
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = read(path)
    run = load_script().execute(book, tmp_path, variant="synthetic")
    assert [cell.source for cell in run.cells] == [cell.source for cell in book.cells]
    counts = [cell.execution_count for cell in run.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in run.cells for output in cell.get("outputs", ())]
    assert any(images(output) for output in outputs)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_outputs_are_stored(path):
    """As the documentation shows them, without progress bars, tracebacks or paths of a machine."""
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = "".join(str(output.get("text", output.get("data", {}).get("text/plain"))) for output in outputs)
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_contain_small_images(path):
    sizes = [
        len(output.data[kind])
        for cell in read(path).cells
        if cell.cell_type == "code"
        for output in cell.outputs
        for kind in images(output)
    ]
    assert sizes
    assert max(sizes) < 300_000


@pytest.mark.parametrize("busy", [True, False])
def test_large_images_are_stored_as_jpeg(busy):
    pixels = (
        np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8) if busy else np.zeros((9, 9, 3), np.uint8)
    )
    drawn = BytesIO()
    Image.fromarray(pixels).save(drawn, "PNG")
    shown = {"image/png": base64.b64encode(drawn.getvalue()).decode(), "text/plain": "<Figure>"}
    load_script().compress(shown)
    assert list(shown) == (["text/plain", "image/jpeg"] if busy else ["image/png", "text/plain"])
    kept = Image.open(BytesIO(base64.b64decode(shown["image/jpeg" if busy else "image/png"])))
    assert kept.size == pixels.shape[:2]


def test_outputs_without_an_image_are_unchanged():
    shown = {"text/plain": "3"}
    load_script().compress(shown)
    assert shown == {"text/plain": "3"}


def test_titles_and_files_are_numbered():
    titles = [read(path).cells[0].source.split("\n")[0] for path in TUTORIALS]
    assert all(title.startswith(f"# {number}. ") for number, title in enumerate(titles, 1))
    assert [path.stem[:2] for path in TUTORIALS] == [f"{number:02d}" for number in range(1, len(TUTORIALS) + 1)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_sections_are_loaded_by_the_package(path):
    """No tutorial reads a file that a reader does not have; what it downloads has a synthetic variant."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    loading = [cell for cell in cells if "sthisto.datasets." in cell.source]
    assert loading
    for cell in cells:
        assert "read_h5ad" not in cell.source or "write_h5ad" in cell.source
    for cell in loading:
        assert "datasets.synthetic" in cell.source or "synthetic" in cell.metadata
