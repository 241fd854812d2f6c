"""Run the tutorials and store their outputs.

    python tutorials/execute.py [--data DIR] [--synthetic] [01_dense_map ...]

Tutorials download their sections with ``sthisto.datasets``, once. With ``--data``, the cell that loads is replaced by
the ``local`` one of its metadata, which reads files of that folder. With ``--synthetic``, it is replaced by the
``synthetic`` one, and nothing is stored: the tests run it this way.
"""

import argparse
import base64
import os
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).parent
LIMIT = 600  # seconds per cell, on a busy machine
LARGE = 100_000  # bytes of an image; larger ones, which show tissue, are stored as JPEG
QUALITY = 85
INLINE = "module://matplotlib_inline.backend_inline"  # figures go into the notebook, whatever backend the caller uses


def execute(
    tutorial: NotebookNode, folder: Path, *, variant: Literal["source", "local", "synthetic"] = "source"
) -> NotebookNode:
    """Run a copy of a tutorial in a folder and return it, with its sources as shown and the outputs of the variant."""
    shown = [cell.source for cell in tutorial.cells]
    run = nbformat.from_dict(tutorial)
    for cell in run.cells:
        cell.source = cell.metadata.get(variant, cell.source)
    where = {"metadata": {"path": folder}}
    client = NotebookClient(run, timeout=LIMIT, startup_timeout=LIMIT, kernel_name="python3", resources=where)
    client.execute(env={**os.environ, "MPLBACKEND": INLINE, "TQDM_DISABLE": "1"})
    for cell, source in zip(run.cells, shown, strict=True):
        cell.source = source
        cell.metadata.pop("execution", None)  # times of day, different in every run
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                compress(output.get("data", {}))
    return run


def compress(shown: dict[str, str]) -> None:
    """Store a large image as JPEG, a fifth of the size: notebooks are part of the repository."""
    drawn = base64.b64decode(shown.get("image/png", ""))
    if len(drawn) > LARGE:
        smaller = BytesIO()
        Image.open(BytesIO(drawn)).convert("RGB").save(smaller, "JPEG", quality=QUALITY, optimize=True)
        shown["image/jpeg"] = base64.b64encode(smaller.getvalue()).decode()
        del shown["image/png"]


def main() -> None:
    """Run the named tutorials, all by default."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tutorials", nargs="*", default=[path.stem for path in sorted(HERE.glob("*.ipynb"))])
    options.add_argument("--data", type=Path, help="folder with section files, for the local variant")
    options.add_argument("--synthetic", action="store_true", help="on synthetic sections; store nothing")
    arguments = options.parse_args()
    variant = "synthetic" if arguments.synthetic else "local" if arguments.data else "source"
    for name in arguments.tutorials:
        path, start = HERE / f"{name}.ipynb", time.perf_counter()
        with TemporaryDirectory() as folder:
            for file in arguments.data.rglob("*.h5ad") if arguments.data else ():
                (Path(folder) / file.name).symlink_to(file.resolve())
            run = execute(nbformat.read(path, as_version=4), Path(folder), variant=variant)
        if not arguments.synthetic:
            nbformat.write(run, path)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
