"""The sample sheet: the sections, where their files are, and what is to be computed."""

import csv
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED, STAINED = "measured", "stained"
COLUMNS = ("section", "image", "role")
SCALES = ("mpp", "pitch_um")  # columns of numbers, which override the options
TABLE = "table"  # a column that may be missing
FITTED = "fitted"  # name of the file of the fitted sections

Settings = dict[str, Any]  # as JSON keeps them


@dataclass(frozen=True)
class Row:
    """A section of the sheet."""

    section: str
    role: str
    image: Path | None  # None: the picture is in the table
    table: Path | None  # None: there is nothing but the picture
    mpp: float | None = None
    pitch_um: float | None = None

    def files(self) -> list[list[Any]]:
        """Name, size and date of its files, and its scale, by which a change is known."""
        return [stamp(path) for path in (self.table, self.image) if path is not None] + [
            [name, value] for name, value in self.scale().items()
        ]

    def scale(self) -> dict[str, float]:
        """What the sheet states of the scale."""
        return {name: getattr(self, name) for name in SCALES if getattr(self, name) is not None}


def stamp(path: Path) -> list[Any]:
    """Name, size and date of a file, or of what is in a folder."""
    found = [each.stat() for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]
    return [path.name, sum(each.st_size for each in found), max((each.st_mtime_ns for each in found), default=0)]


def read_sheet(path: Path) -> list[Row]:
    """Read the rows of a sheet; paths count from the sheet's folder.

    Raises
    ------
    FileNotFoundError
        No sheet, or files that it names are not there.
    ValueError
        Columns or values that are missing, unknown or repeated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sample sheet {path}.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file, skipinitialspace=True)
        try:
            _check_columns(path, [name.strip() for name in lines.fieldnames or []])
            rows = [_row(path, line, values) for line, values in enumerate(lines, 2)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no table of text with commas between: {error}.") from error
    _check_rows(path, rows)
    return rows


def _check_columns(path: Path, found: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)} (found: {', '.join(found) or 'nothing'}). Its first line is "
            "section,image,role, and table where tables are elsewhere."
        )
    known = (*COLUMNS, TABLE, *SCALES)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"{path}: unknown column {', '.join(unknown)}; there are {', '.join(known)}.")


def _row(path: Path, line: int, values: dict[Any, Any]) -> Row:
    """Read a line, ``measured`` ones with a table of their name where none is given."""
    if None in values or None in values.values():
        raise ValueError(f"{path}, line {line}: it has another number of values than the first line has columns.")
    values_by_column = {name.strip(): value.strip() for name, value in values.items()}
    section, role = values_by_column["section"], values_by_column["role"]
    if not section or "/" in section or "\\" in section or section.startswith(".") or section == FITTED:
        raise ValueError(f"{path}, line {line}: {section!r} cannot be a section's name, as a file is named after it.")
    if role not in (MEASURED, STAINED):
        raise ValueError(f"{path}, line {line}: role {role!r}; a section is measured or stained.")
    if role == STAINED and not values_by_column["image"]:
        raise ValueError(f"{path}, line {line}: section {section!r} was stained, but no image is named.")
    table = values_by_column.get(TABLE) or (_table_of(path.parent, section) if role == MEASURED else "")
    image, table = (path.parent / name if name else None for name in (values_by_column["image"], table))
    return Row(section, role, image, table, *(_number(path, line, name, values_by_column.get(name)) for name in SCALES))


def _table_of(folder: Path, section: str) -> str:
    """Name the table of a section where the sheet does not: an h5ad file, or a folder of Space Ranger."""
    return section if (folder / section).is_dir() and not (folder / f"{section}.h5ad").exists() else f"{section}.h5ad"


def _number(path: Path, line: int, name: str, text: str | None) -> float | None:
    """Read micrometers, which may be left out."""
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{path}, line {line}: {name} {text!r} is no length in micrometers.")
    return number


def _check_rows(path: Path, rows: list[Row]) -> None:
    """Refuse what would be found out after hours: repeated names, nothing to learn from, files that are not there."""
    double = [name for name, n in Counter(row.section for row in rows).items() if n > 1]
    if double:
        raise ValueError(f"{path} names {', '.join(double)} more than once.")
    if not any(row.role == MEASURED for row in rows):
        raise ValueError(f"{path} names no section with role measured: there is nothing to learn from.")
    lost = [str(row.table) for row in rows if row.table is not None and not row.table.exists()]
    lost += [str(row.image) for row in rows if row.image is not None and not row.image.is_file()]
    if lost:
        raise FileNotFoundError(f"{path} names files that are not there: {', '.join(lost)}.")


def changes(before: Settings, now: Settings) -> list[str]:
    """Name what differs between the settings of two runs, as a person would."""
    sections = [each.get("sections", {}) for each in (before, now)]
    differ = [_said(name) for name in now if name != "sections" and before.get(name) != now[name]]
    names = sorted({name for each in sections for name in each})
    return differ + [f"section {name}" for name in names if sections[0].get(name) != sections[1].get(name)]


def _said(name: str) -> str:
    """Name an option as it is typed, and other settings in words."""
    return {"files": "its files", "version": "the version of sthisto"}.get(name, f"--{name.replace('_', '-')}")
