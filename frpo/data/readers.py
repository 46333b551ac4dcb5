"""Read the rows of a file, one at a time, with bounded memory for a row: .jsonl, .json, .csv, .parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frpo.data.rows import Row, clip, did_you_mean, kind

MAX_LINE_BYTES = 16 * 2**20  # a longer line is a file of another kind, not a prompt
MAX_JSON_BYTES = 512 * 2**20  # .json has to be parsed whole
PARQUET_ROWS = 1024  # rows decoded at a time


def read_rows(path: Path, skip_lines: int = 0) -> Iterator[Row]:
    """Yield the rows of ``path`` in order, by its suffix; ``skip_lines`` lines of a .csv stand above its header.

    A folder stands for the files in it that can be read, in the order of their names.

    Raises ``FileNotFoundError`` where there is no such file, ``ValueError`` with the line that cannot be read.
    """
    if path.is_dir():
        return _read_folder(path, skip_lines)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"cannot read {path}: got suffix {path.suffix!r}, expected one of {sorted(READERS)}; "
            "convert the file or rename it"
        )
    check_file(path)
    if reader is _read_csv:
        return _read_csv(path, skip_lines)
    if skip_lines:
        raise ValueError(f"skip_lines: got {skip_lines} for {path}, but only a .csv has lines above its header")
    return reader(path)


def _read_folder(path: Path, skip_lines: int) -> Iterator[Row]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS and not file.name.startswith("."))
    if not files:
        raise ValueError(f"{path} is a folder without files to read; expected some of {sorted(READERS)} directly in it")
    for file in files:
        for row in read_rows(file, skip_lines):
            yield Row(f"{file.name}, {row.place}", row.values)


def check_file(path: Path) -> None:
    """Refuse a path that names no file (and say the nearest name there), or an empty file."""
    if not path.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" The folder {path.parent} does not exist either."
        raise FileNotFoundError(
            f"no file at {path.absolute()}.{did_you_mean(path.name, beside)}{where} "
            "Give `path` relative to the working folder, or absolute."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected at least one row")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, decoded one by one so that a bad byte is known by its line."""
    with path.open("rb") as file:
        for number in range(1, 2**63):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; "
                    "expected one row per line: is it of another kind than its suffix says?"
                )
            yield number, _decode(raw, path, number)


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad = line + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {bad}: byte 0x{raw[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8 (iconv -f latin1 -t utf-8, say)"
        ) from error


def _parse(text: str, path: Path, line: int | None) -> Any:
    """``json.loads`` whose every failure is a ``ValueError`` with the place and without the text."""
    place = line
    try:
        return json.loads(text, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        place = line or error.lineno
        problem = f"malformed JSON at column {error.colno}: {error.msg}"
    except RecursionError:
        problem = "JSON nested too deeply"
    except ValueError as error:  # a constant outside JSON, an integer of thousands of digits
        problem = str(error)
    where = f"{path}, line {place}" if place else str(path)
    raise ValueError(f"{where}: {problem}; expected one JSON object per row. Mend or drop the row.")


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON; write null")


def _object(value: Any, place: str, path: Path) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{path}, {place}: got {kind(value)}, expected an object ({{"prompt": ..., "task": ...}})')
    return Row(place, value)


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            yield _object(_parse(line, path, number), f"line {number}", path)


def _read_json(path: Path) -> Iterator[Row]:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; a .json file is parsed whole, up to {MAX_JSON_BYTES}: write .jsonl")
    table = _parse(_decode(path.read_bytes(), path, 1), path, None)
    if not isinstance(table, list):
        raise ValueError(
            f"{path}: got {kind(table)} at the top, expected a list of objects; one object per line is called .jsonl"
        )
    for number, value in enumerate(table, start=1):
        yield _object(value, f"row {number}", path)


def _read_csv(path: Path, skip_lines: int = 0) -> Iterator[Row]:
    reader = csv.reader((line for number, line in _lines(path) if number > skip_lines), strict=True)
    try:
        header = next(reader, [])
        if not all(header) or len(set(header)) != len(header):
            got = [clip(name) for name in header]
            raise ValueError(f"{path}: line {skip_lines + 1} must name the columns, each once; got {got}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {skip_lines + reader.line_num}: got {len(cells)} cells, expected {len(header)}; "
                    "quote cells that hold a comma or a line break"
                )
            yield Row(f"line {skip_lines + reader.line_num}", dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {skip_lines + reader.line_num}: malformed CSV: {error}; mend the quotes or write it as "
            ".jsonl"
        ) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a readable parquet file after row {number} ({type(error).__name__}); "
            "write or download it again"
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
