"""Source files, here or on the hub: csv, jsonl, parquet and plain text, read with errors that name the line.

A file is read whole, once: its bytes are hashed (the prepared data set carries the hash) and then parsed. What cannot
be read as it stands is refused: no row is dropped, filled up or cut.
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
Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages; its fields


class Content(NamedTuple):
    """One source file: its name for messages, and its bytes."""

    name: str
    data: bytes

    @property
    def basename(self) -> str:
        return self.name.rsplit("/", 1)[-1]


def find(path: str, data_dir: epath.PathLike) -> epath.Path:
    """The file or directory `path`: as written, else under `data_dir`; `hf://…` is fetched from the hub.

    Raises:
      UserError: it is in none of these places.
    """
    if path.startswith(HUB):
        owner, name, file = (*path.removeprefix(HUB).split("/", 2), "", "")[:3]
        if not (owner and name and file):
            raise UserError(f"{path!r}: a file on the hub is written {HUB}OWNER/NAME/FILE")
        return download(f"{owner}/{name}", file)
    here = epath.Path(path).expanduser()
    if here.exists():
        return here
    beside = epath.Path(data_dir) / path if str(data_dir) and not here.is_absolute() else None
    if beside is not None and beside.exists():
        return beside
    looked = f" (nor {beside})" if beside is not None else ""
    raise UserError(f"no file {path!r}{looked}{_neighbours(here)}")


def find_matching(directory: epath.Path, preferences: Sequence[Sequence[str]]) -> list[epath.Path]:
    """Files of `directory` that match the first of several lists of glob patterns that matches anything."""
    for patterns in preferences:
        matching = sorted({file for pattern in patterns for file in directory.glob(pattern)})
        if matching:
            return matching
    wanted = ", ".join(pattern for patterns in preferences for pattern in patterns)
    raise UserError(f"{directory}: holds none of {wanted}")


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
    """16 hexadecimal digits that change when a byte of a file, a file's own name or a setting does.

    The directory does not count: the same file elsewhere is the same data.
    """
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for content in contents:
        hasher.update(f"{content.basename}\0{len(content.data)}\0".encode())
        hasher.update(content.data)
    return hasher.hexdigest()[:16]


def download(repository: str, filename: str) -> epath.Path:
    """A published file of a data set on the Hugging Face hub, through its local cache.

    Raises:
      UserError: no network, no such file, or no permission; the line says where else the file can be put.
    """
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.hf_hub_download(repository, filename, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its own, requests', httpx's and OS errors
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{filename!r} of the hub's data set {repository!r} cannot be had ({type(error).__name__}: {reason}); "
            "with the file on this machine, set data_dir or write its path"
        ) from None


def _neighbours(path: epath.Path) -> str:
    """Names of the missing file's directory, when there is one, with the nearest first."""
    if not path.parent.exists():
        return ""
    names = [file.name for file in path.parent.iterdir()]
    return suggest(path.name, names) if 0 < len(names) <= 20 else ""


def decode(content: Content) -> str:
    """The file as text: UTF-8, a byte-order mark dropped.

    Raises:
      UserError: bytes that are no UTF-8, with the line.
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
    """(file and line, text) of every line that is not blank; a line ends at a newline and nowhere else."""
    for number, line in enumerate(decode(content).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield f"{content.name}, line {number}", line


def csv_rows(content: Content, columns: Iterable[str]) -> Iterator[Row]:
    """Rows of a csv file with a header.

    Raises:
      UserError: a needed column is absent or there twice, or a row has another number of fields.
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
                "a field with a comma in it stands in quotes"
            )
        yield where, dict(zip(header, fields, strict=True))


def csv_lists(content: Content) -> Iterator[tuple[str, list[str]]]:
    """(file and line where it begins, fields) of every row of a csv file that is not blank.

    Not by pandas: it fills short rows up, and reads text as numbers. Raises UserError where quotes are misplaced.
    """
    csv.field_size_limit(1 << 30)  # articles exceed the 128 kB that the module allows
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
      UserError: a line is no JSON object, lacks a needed field, or holds half a character.
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
    """Rows of a parquet file, the form in which the hub serves some data sets."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content.data))
        table.validate(full=True)  # text that is no UTF-8, among others
    except pyarrow.ArrowException as error:
        raise UserError(f"{content.name}: not parquet ({' '.join(str(error).split())[:120]})") from None
    require(content.name, columns, table.column_names)
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{content.name}, row {number}", row


READERS = {".csv": csv_rows, ".jsonl": json_rows, ".json": json_rows, ".parquet": parquet_rows}


def rows(content: Content, columns: Iterable[str]) -> Iterator[Row]:
    """Rows of a csv, jsonl or parquet file, by its suffix; all of them, as they are."""
    suffix = "." + content.basename.rsplit(".", 1)[-1].lower()
    if suffix not in READERS:
        raise UserError(f"{content.name}: found suffix {suffix!r}, expected one of {', '.join(READERS)}")
    return READERS[suffix](content, columns)


def require(where: str, columns: Iterable[str], header: Iterable[str]) -> None:
    """UserError unless every needed column is in the header, once."""
    header = list(header)
    for column in columns:
        if column not in header:
            raise UserError(f"{where}: no column {column!r}; found {', '.join(map(repr, header))}")
        if header.count(column) > 1:
            raise UserError(f"{where}: the column {column!r} stands there {header.count(column)} times; rename one")


def text_of(value: Any) -> str:
    """A field as text: null is empty, text stays, anything else as JSON writes it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def number_of(value: Any, where: str) -> float:
    """A field as a number: null and nothing are NaN.

    Raises:
      UserError: it is not a number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: found {value!r}, expected a number") from None
