"""Outputs are whole or not there: errors, full disks, signals, links, and two writers at once."""

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import anndata as ad
import h5py
import numpy as np
import pytest

import sthisto
from sthisto import _files
from sthisto._files import check_target, whole_file, whole_folder
from sthisto.cli import main
from sthisto.cli._files import _write_h5ad

RNG = np.random.default_rng(0)
OLD = 1e6  # a date long ago


@pytest.fixture(scope="module")
def fitted():
    adata = sthisto.datasets.synthetic(60, n_genes=30)
    sthisto.tl.fit(adata, "idw")
    return adata


def names(folder):
    return sorted(each.name for each in folder.iterdir())


# --- one writer ------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("former")
    with pytest.raises(FileNotFoundError), whole_file(path) as draft:
        draft.with_name("half").write_bytes((tmp_path / "lost").read_bytes())
    assert path.read_text() == "former"
    assert names(tmp_path) == ["out.txt"]


def test_two_writers_at_once_do_not_share_a_draft(tmp_path):
    path = tmp_path / "out.txt"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer one is finished last
    assert names(tmp_path) == ["out.txt"]


def test_nobody_else_can_reach_a_draft(tmp_path):
    with whole_file(tmp_path / "out.txt") as draft:
        assert stat.S_IMODE(draft.parent.stat().st_mode) == 0o700
        draft.touch()


def test_links_and_permissions_are_kept(tmp_path):
    path, link = tmp_path / "out.txt", tmp_path / "link.txt"
    path.write_text("former")
    path.chmod(0o640)
    link.symlink_to(path)
    with whole_file(link) as draft:
        draft.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "out.txt") as draft:
        draft.touch()
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "store.zarr"
    for content in ("first", "second"):
        with whole_folder(path, replace=True) as draft:
            (draft / "deep").mkdir(parents=True)
            (draft / "deep" / content).touch()
    with pytest.raises(FileNotFoundError), whole_folder(path, replace=True) as draft:
        (draft / "deep").mkdir()
    with pytest.raises(FileExistsError, match="written meanwhile"), whole_folder(path) as draft:
        draft.mkdir()
    assert names(path / "deep") == ["second"]
    assert names(tmp_path) == ["store.zarr"]


def test_drafts_of_dead_processes_are_removed_and_no_others(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "precious").mkdir(parents=True)
    target = tmp_path / "target"
    for name in ("dead", "alive", "fresh", "moved"):
        (target / f".sthisto-{name}" / "inside").mkdir(parents=True)
    (target / ".sthisto-moved" / "former").mkdir()  # what was about to be replaced
    (target / ".sthisto-link").symlink_to(elsewhere)
    for name in ("dead", "alive", "moved"):
        os.utime(target / f".sthisto-{name}", (OLD, OLD))
    alive = os.open(target / ".sthisto-alive", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    with whole_file(target / "out.txt") as draft:
        draft.touch()
    os.close(alive)
    assert names(target) == [".sthisto-alive", ".sthisto-fresh", ".sthisto-link", ".sthisto-moved", "out.txt"]
    assert names(elsewhere) == ["precious"]


# --- what cannot be written is refused before the work ----------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "in.h5ad").touch()
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "in.h5ad")
    os.mkfifo(tmp_path / "pipe.h5ad")
    for path, error, match in (
        (tmp_path / "link.h5ad", ValueError, "is read by this command"),
        (tmp_path / "pipe.h5ad", ValueError, "no ordinary file"),
        (tmp_path / "lost" / "out.h5ad", FileNotFoundError, "no folder"),
        (tmp_path / f"{'n' * 300}.h5ad", OSError, "name too long"),
    ):
        with pytest.raises(error, match=match):
            check_target(path, inputs=[tmp_path / "in.h5ad"])
    check_target(tmp_path / "out.h5ad", inputs=[tmp_path / "in.h5ad", tmp_path / "lost"])
    assert names(tmp_path) == ["in.h5ad", "link.h5ad", "pipe.h5ad"]


def test_a_read_only_folder_and_file(tmp_path, monkeypatch):
    closed, kept = tmp_path / "closed", tmp_path / "kept.h5ad"
    closed.mkdir(mode=0o500)
    kept.touch(mode=0o400)
    if os.geteuid() == 0:  # root may write anywhere: what the system would answer to others
        monkeypatch.setattr(os, "access", lambda path, _: bool(path.stat().st_mode & 0o222))
        refused = PermissionError(errno.EACCES, "Permission denied", str(closed / ".sthisto-1"))
        monkeypatch.setattr(_files.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(refused))
    with pytest.raises(PermissionError, match=r"closed/out\.h5ad"):
        check_target(closed / "out.h5ad")
    with pytest.raises(PermissionError, match="is read-only"):
        check_target(kept)


@pytest.mark.parametrize("command", ["features {0} -o {0}", "fit {0} -o {0} --model idw", "upsample {0} -o {0}"])
def test_the_measured_section_is_not_replaced(command, fitted, tmp_path, capsys):
    path = tmp_path / "section.h5ad"
    fitted.write_h5ad(path)
    before = path.read_bytes()
    assert main([*command.format(path).split(), "--quiet"]) == 2
    assert "is read by this command and would be replaced" in capsys.readouterr().err
    assert path.read_bytes() == before


# --- full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def small_files(limit):
    """No file grows beyond the limit, as on a disk that gets full or a quota that ends."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.fixture(params=["file size", "disk"])
def full(request, tmp_path_factory):
    """A folder where some kilobytes are free, and the context in which that is so."""
    folder = tmp_path_factory.mktemp("full")
    if request.param == "file size":
        yield folder, small_files(20_000)
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system of some kilobytes cannot be mounted here")
    yield folder, small_files(resource.RLIM_INFINITY)
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_nothing(full, fitted, tmp_path, capsys):
    folder, small = full
    fitted.write_h5ad(tmp_path / "section.h5ad")
    arguments = ["fit", str(tmp_path / "section.h5ad"), "--model", "idw", "--quiet"]
    with small:
        for option, name in (("-o", "out.h5ad"), ("-o", "out.zarr"), ("--save", "fit.safetensors")):
            assert main([*arguments, option, str(folder / name)]) == 2
            out, error = capsys.readouterr()
            assert out == ""
            assert error.count("\n") == 1
            assert "No space left on device" in error or "File too large" in error
            assert names(folder) == []
        with pytest.raises(OSError, match=r"No space left|File too large"):
            sthisto.tl.save(fitted, folder / "fit.safetensors")
        with pytest.raises(OSError, match=r"No space left|File too large"):
            sthisto.pl.genes(fitted, "region_00", show=False, save=folder / "map.pdf")
    assert names(folder) == []


@pytest.mark.parametrize("limit", [0, 1000, 5_000, 20_000, 50_000, 100_000])
def test_hdf5_survives_a_full_disk_at_any_time(limit, fitted, tmp_path):
    """HDF5 itself fails again when it closes the file, and at the exit of the process."""
    with small_files(limit), pytest.raises(OSError, match="File too large"):
        _write_h5ad(fitted, tmp_path / "out.h5ad")


def test_files_are_those_of_anndata(fitted, tmp_path):
    adata = fitted.copy()
    adata.obs["kind"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    adata.raw = adata
    _write_h5ad(adata.copy(), tmp_path / "ours.h5ad")
    adata.write_h5ad(tmp_path / "theirs.h5ad")
    assert contents_of(tmp_path / "ours.h5ad") == contents_of(tmp_path / "theirs.h5ad")


def contents_of(path):
    """Every array and attribute of an HDF5 file."""
    found = {}

    def note(name, each):
        value = np.asarray(each[()]).tolist() if isinstance(each, h5py.Dataset) else None
        found[name] = repr((value, {key: np.asarray(kept).tolist() for key, kept in each.attrs.items()}))

    with h5py.File(path) as file:
        note("/", file)
        file.visititems(note)
    return found


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard():
    """Signals as in a terminal: a shell has background jobs ignore SIGINT, and nohup SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.usefixtures("heard")
def test_a_signal_during_a_write(number, swallowed, fitted, tmp_path, monkeypatch, capsys):
    fitted.write_h5ad(tmp_path / "section.h5ad")
    (tmp_path / "out.h5ad").write_text("former")
    write = ad.io.write_elem

    def stopped(file, *arguments):
        write(file, *arguments)
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if not swallowed:  # as HDF5 does in its destructors
                raise

    monkeypatch.setattr(ad.io, "write_elem", stopped)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    arguments = ["fit", str(tmp_path / "section.h5ad"), "--model", "idw", "-o", str(tmp_path / "out.h5ad"), "--quiet"]
    assert main(arguments) == 128 + number
    assert capsys.readouterr().err == "sthisto: interrupted, nothing half-written is left\n"
    assert (tmp_path / "out.h5ad").read_text() == "former"
    assert names(tmp_path) == ["out.h5ad", "section.h5ad"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    monkeypatch.setattr(ad.io, "write_elem", write)
    assert main(arguments) == 0  # the next run is not stopped by it


def test_a_signal_that_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _files.stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


# --- two processes ---------------------------------------------------------------------------------------------------

WRITER = """
    import sys
    import anndata as ad
    import sthisto
    from sthisto.cli._files import write
    from sthisto.cli._job import Job

    path, seed = sys.argv[1], int(sys.argv[2])
    adata = sthisto.datasets.synthetic(60, n_genes=30, random_state=seed)
    sthisto.tl.fit(adata, "idw")
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        write(adata, sthisto.cli._files.Path(path + ".h5ad"), Job(None))
        sthisto.tl.save(adata, path + ".safetensors")
"""


def test_two_processes_write_whole_files(tmp_path):
    (tmp_path / "out").mkdir()
    script = tmp_path / "writer.py"
    script.write_text(textwrap.dedent(WRITER))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, script, tmp_path / "out" / "fit", str(seed)], **pipes) for seed in (0, 1)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    assert names(tmp_path / "out") == ["fit.h5ad", "fit.safetensors"]
    whole = [sthisto.datasets.synthetic(60, n_genes=30, random_state=seed).X.toarray() for seed in (0, 1)]
    written = ad.read_h5ad(tmp_path / "out" / "fit.h5ad").X.toarray()
    assert any(np.array_equal(written, each) for each in whole)
    sthisto.tl.load(tmp_path / "out" / "fit.safetensors")
