"""The sample sheet: the sections, where their files are, and what is to be computed."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED, STAINED = "measured", "stained"
COLUMNS = ("section", "image", "role")
SECTION = "section"  # and the obs column in what is written
TABLE = "table"  # the column that may be missing
FITTED = "fitted"  # name of the file of the fitted sections

Settings = dict[str, Any]  # as JSON keeps them


@dataclass(frozen=True)
class Row:
    """A section of the sheet."""

    section: str
    role: str
    image: Path | None  # None: the picture is in the table
    table: Path | None  # None: there is nothing but the picture

    def files(self) -> list[list[Any]]:
        """Name, size and date of its files, by which a change is known."""
        return [stamp(path) for path in (self.table, self.image) if path is not None]


def stamp(path: Path) -> list[Any]:
    """Name, size and date of a file."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]


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
    unknown = [name for name in found if name not in (*COLUMNS, TABLE)]
    if unknown:
        raise ValueError(f"{path}: unknown column {', '.join(unknown)}; there are section, image, role, table.")


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
    table = values_by_column.get(TABLE) or (f"{section}.h5ad" if role == MEASURED else "")
    image, table = (path.parent / name if name else None for name in (values_by_column["image"], table))
    return Row(section, role, image, table)


def _check_rows(path: Path, rows: list[Row]) -> None:
    """Refuse what would be found out after hours: repeated names, nothing to learn from, files that are not there."""
    double = [name for name, n in Counter(row.section for row in rows).items() if n > 1]
    if double:
        raise ValueError(f"{path} names {', '.join(double)} more than once.")
    if not any(row.role == MEASURED for row in rows):
        raise ValueError(f"{path} names no section with role measured: there is nothing to learn from.")
    lost = [str(file) for row in rows for file in (row.table, row.image) if file is not None and not file.is_file()]
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
