"""Seconds and peak memory of a fit as the spots grow.

    python benchmarks/scale.py [--spots 1000 10000 100000] [--genes 1000] [--features 64] [--model attention]

One section of synthetic expression on a square lattice, each size in a process of its own. The peak is the resident
memory above that before the fit, the section included in neither. Beside each figure stands the load of the machine.
"""

import argparse
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np

from sthisto import models


def section(n: int, genes: int, features: int) -> models.Section:
    """Log-normalized counts that follow smooth factors, which the image features show with noise."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n)))
    xy = np.stack(np.divmod(np.arange(n), side)[::-1], axis=1).astype(float)
    z = np.cos(xy @ rng.normal(scale=0.15, size=(2, 6)) + rng.uniform(0, 6, 6)).astype(np.float32)
    image = z @ rng.normal(size=(6, features)).astype(np.float32) + 3 * rng.normal(size=(n, features)).astype(
        np.float32
    )
    loadings, expression = rng.normal(scale=0.5, size=(6, genes)), np.empty((n, genes), dtype=np.float32)
    for start in range(0, n, 4096):
        rows = slice(start, start + 4096)
        expression[rows] = np.log1p(rng.poisson(np.exp(z[rows] @ loadings - 1)))
    return models.Section(name="a", xy=xy, features=image, expression=expression)


def resident() -> float:
    """Resident memory of this process, GB."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(model: str, n: int, genes: int, features: int) -> None:
    """Fit once and print."""
    spots = section(n, genes, features)
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, processor = time.perf_counter(), time.process_time()
    models.build(model).fit([spots], device="cpu")
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    done.set()
    watcher.join()
    load = os.getloadavg()[0]
    print(
        f"| {n} | {genes} | {wall:.1f} | {processor:.1f} | {peak[0] - before:.2f} | {load:.1f} of {os.cpu_count()} |",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--spots", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options.add_argument("--genes", type=int, default=1000)
    options.add_argument("--features", type=int, default=64)
    options.add_argument("--model", default="attention", choices=list(models.MODELS))
    given = options.parse_args()
    print("| spots | genes | seconds | processor seconds | peak GB | load |\n|---|---|---|---|---|---|", flush=True)
    for n in given.spots:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(given.model, n, given.genes, given.features)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
