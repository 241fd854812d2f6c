"""Run the tutorials and keep what they show.

    python tutorials/execute.py [--data DIR] [--synthetic] [01_dense_map ...]

A tutorial reads its section by file name from the folder it runs in. Here that is a temporary folder that shows the
sections of the data folder; with ``--synthetic``, the cell that reads is replaced by the one in its metadata, which
makes a synthetic section in its place, and nothing is kept: so the tests run it.
"""

import argparse
import base64
import os
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
LIMIT = 600  # seconds of one cell, on a crowded machine
LARGE = 100_000  # bytes of a picture; above, which means it shows tissue, it is kept as JPEG
QUALITY = 85
INLINE = "module://matplotlib_inline.backend_inline"  # pictures go into the notebook, whatever the caller draws on


def execute(tutorial: NotebookNode, folder: Path, *, synthetic: bool) -> NotebookNode:
    """Run a copy of a tutorial in a folder and return it, as shown but with what its cells gave."""
    shown = [cell.source for cell in tutorial.cells]
    run = nbformat.from_dict(tutorial)
    for cell in run.cells:
        if synthetic:
            cell.source = cell.metadata.get("synthetic", cell.source)
    client = NotebookClient(run, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env={**os.environ, "MPLBACKEND": INLINE})
    for cell, source in zip(run.cells, shown, strict=True):
        cell.source = source
        cell.metadata.pop("execution", None)  # times of day, different in every run
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress bars
            for output in cell.outputs:
                lighten(output.get("data", {}))
    return run


def lighten(shown: dict[str, str]) -> None:
    """Keep a large picture as JPEG, a fifth of the size: notebooks live in the repository."""
    drawn = base64.b64decode(shown.get("image/png", ""))
    if len(drawn) > LARGE:
        smaller = BytesIO()
        Image.open(BytesIO(drawn)).convert("RGB").save(smaller, "JPEG", quality=QUALITY, optimize=True)
        shown["image/jpeg"] = base64.b64encode(smaller.getvalue()).decode()
        del shown["image/png"]


def main() -> None:
    """Run those named, all by default."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tutorials", nargs="*", default=[path.stem for path in sorted(HERE.glob("*.ipynb"))])
    options.add_argument("--data", type=Path, default=DATA, help="folder of the real sections")
    options.add_argument("--synthetic", action="store_true", help="on synthetic sections; keep nothing")
    arguments = options.parse_args()
    for name in arguments.tutorials:
        path, start = HERE / f"{name}.ipynb", time.perf_counter()
        with TemporaryDirectory() as folder:
            for file in (*arguments.data.glob("*/*.h5ad"), *arguments.data.glob("*/*.jpg")):
                (Path(folder) / file.name).symlink_to(file.resolve())
            run = execute(nbformat.read(path, as_version=4), Path(folder), synthetic=arguments.synthetic)
        if not arguments.synthetic:
            nbformat.write(run, path)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
