"""Reads source files, local or from the hub: csv, jsonl, parquet and plain text. Errors name the line.

A file is read into memory once: its bytes are hashed (the hash identifies the prepared data set) and then parsed.
Malformed input is an error: no row is dropped, filled up or cut.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from unidetox_jax.errors import UserError, suggest

HUB = "hf://"  # hf://OWNER/NAME/PATH: one file of a data set on the hub
Row = tuple[str, Mapping[str, Any]]  # (file and line for messages, fields)


class Content(NamedTuple):
    """A source file's name, for messages, and its bytes."""

    name: str
    data: bytes

    @property
    def basename(self) -> str:
        return self.name.rsplit("/", 1)[-1]


def find(path: str, data_dir: epath.PathLike) -> epath.Path:
    """The file or directory `path`, as given or under `data_dir`; `hf://…` is downloaded from the hub.

    Raises:
      UserError: it does not exist.
    """
    if path.startswith(HUB):
        owner, name, file = (*path.removeprefix(HUB).split("/", 2), "", "")[:3]
        if not (owner and name and file):
            raise UserError(f"{path!r}: a file on the hub is written {HUB}OWNER/NAME/FILE")
        return download(f"{owner}/{name}", file)
    direct = epath.Path(path).expanduser()
    if direct.exists():
        return direct
    in_data_dir = epath.Path(data_dir) / path if str(data_dir) and not direct.is_absolute() else None
    if in_data_dir is not None and in_data_dir.exists():
        return in_data_dir
    also = f" (nor {in_data_dir})" if in_data_dir is not None else ""
    raise UserError(f"no file {path!r}{also}{_suggest_sibling(direct)}")


def find_matching(directory: epath.Path, pattern_groups: Sequence[Sequence[str]]) -> list[epath.Path]:
    """The files of `directory` that match the first group of glob patterns with any match."""
    for patterns in pattern_groups:
        matching = sorted({file for pattern in patterns for file in directory.glob(pattern)})
        if matching:
            return matching
    expected = ", ".join(pattern for patterns in pattern_groups for pattern in patterns)
    raise UserError(f"{directory}: holds none of {expected}")


def read(paths: Iterable[epath.PathLike]) -> tuple[Content, ...]:
    """The files' names and bytes."""
    contents = []
    for path in map(epath.Path, paths):
        try:
            contents.append(Content(str(path), path.read_bytes()))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return tuple(contents)


def content_hash(contents: Iterable[Content], *settings: Any) -> str:
    """16 hexadecimal digits of a hash over the files' names and bytes and the settings; directories do not count."""
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for content in contents:
        hasher.update(f"{content.basename}\0{len(content.data)}\0".encode())
        hasher.update(content.data)
    return hasher.hexdigest()[:16]


def download(repository: str, filename: str) -> epath.Path:
    """A file of a data set on the Hugging Face hub, downloaded through the hub's cache.

    Raises:
      UserError: no network, no such file or no permission; says how to use a local file instead.
    """
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.hf_hub_download(repository, filename, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its own, requests', httpx's and OS errors
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{filename!r} of the hub's data set {repository!r}: download failed ({type(error).__name__}: {reason}); "
            "to use a local file, set data_dir or write its path"
        ) from None


def _suggest_sibling(path: epath.Path) -> str:
    """Suggests existing names in the missing file's directory, unless there are too many."""
    if not path.parent.exists():
        return ""
    names = [file.name for file in path.parent.iterdir()]
    return suggest(path.name, names) if 0 < len(names) <= 20 else ""


def decode(content: Content) -> str:
    """The file as text: UTF-8, without a byte-order mark.

    Raises:
      UserError: invalid UTF-8; names the line.
    """
    data = content.data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{content.name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def lines(content: Content) -> Iterator[tuple[str, str]]:
    """(file and line, text) of every line that is not blank; only \\n and \\r\\n end a line."""
    for number, line in enumerate(decode(content).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield f"{content.name}, line {number}", line


def csv_rows(content: Content, columns: Iterable[str]) -> Iterator[Row]:
    """Rows of a csv file with a header.

    Raises:
      UserError: a required column is missing or duplicated, or a row has the wrong number of fields.
    """
    rows = csv_lists(content)
    where, header = next(rows, ("", []))
    if not header:
        raise UserError(f"{content.name}: empty; expected a csv file with a header")
    require(where, columns, header)
    for where, fields in rows:
        if len(fields) != len(header):
            raise UserError(
                f"{where}: {len(fields)} fields, expected {len(header)} as in the header; "
                "a field with a comma in it needs quotes"
            )
        yield where, dict(zip(header, fields, strict=True))


def csv_lists(content: Content) -> Iterator[tuple[str, list[str]]]:
    """(file and first line, fields) of every non-blank row of a csv file. Raises UserError for misplaced quotes.

    Not by pandas, which fills up short rows and reads text as numbers.
    """
    csv.field_size_limit(1 << 30)  # articles exceed the module's default of 128 kB
    reader = csv.reader(io.StringIO(decode(content), newline=""), strict=True)
    number = 1
    try:
        for fields in reader:
            if fields:
                yield f"{content.name}, line {number}", fields
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{content.name}, line {number}: a quote is not closed, or not doubled within its field ({error})"
        ) from None


def json_rows(content: Content, columns: Iterable[str]) -> Iterator[Row]:
    """Objects of a jsonl file, one a line.

    Raises:
      UserError: a line is not a JSON object, lacks a required field or holds half of a surrogate pair.
    """
    columns = tuple(columns)
    for where, line in lines(content):
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"{where}: {half!r} is half of a surrogate pair, expected both halves or none") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{where}: JSON that cannot be read ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {type(row).__name__}, expected a JSON object")
        require(where, columns, row)
        yield where, row


def parquet_rows(content: Content, columns: Iterable[str]) -> Iterator[Row]:
    """Rows of a parquet file, the format of some data sets on the hub."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content.data))
        table.validate(full=True)  # invalid UTF-8, among others
    except pyarrow.ArrowException as error:
        raise UserError(f"{content.name}: not parquet ({' '.join(str(error).split())[:120]})") from None
    require(content.name, columns, table.column_names)
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{content.name}, row {number}", row


READERS = {".csv": csv_rows, ".jsonl": json_rows, ".json": json_rows, ".parquet": parquet_rows}


def rows(content: Content, columns: Iterable[str]) -> Iterator[Row]:
    """All rows of a csv, jsonl or parquet file, by its suffix."""
    suffix = "." + content.basename.rsplit(".", 1)[-1].lower()
    if suffix not in READERS:
        raise UserError(f"{content.name}: found suffix {suffix!r}, expected one of {', '.join(READERS)}")
    return READERS[suffix](content, columns)


def require(where: str, columns: Iterable[str], header: Iterable[str]) -> None:
    """Raises UserError unless every required column is in the header exactly once."""
    header = list(header)
    for column in columns:
        if column not in header:
            raise UserError(f"{where}: no column {column!r}; found {', '.join(map(repr, header))}")
        if header.count(column) > 1:
            raise UserError(f"{where}: {header.count(column)} columns are called {column!r}; rename one")


def text_of(value: Any) -> str:
    """A field as text: null becomes empty, text stays, anything else becomes JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def number_of(value: Any, where: str) -> float:
    """A field as a number; null and blank become NaN.

    Raises:
      UserError: it is not a number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: found {value!r}, expected a number") from None
