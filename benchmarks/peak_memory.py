"""Peak of the resident memory of this process since a moment of one's choosing, as Linux counts it."""

from pathlib import Path


def forget_peak() -> None:
    """Count the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Highest resident memory since the peak was forgotten, or since the process began."""
    return _status("VmHWM")


def resident_gb() -> float:
    """Resident memory now."""
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024**2
