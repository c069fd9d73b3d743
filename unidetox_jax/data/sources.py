"""Loads data sets by a spec, a short string.

    dghs            dghs:official      a named data set, and a variant of it,
    toxigen         mmlu               from data_dir/NAME, or from the hub without data_dir
    realtoxicityprompts   politics     bold         attaq
    text:FILE                          a text a line
    distilled:FILE                     csv with the column Text, or jsonl with the field text
    csv:FILE?text=COLUMN&label=COLUMN  a field of the records from each column; jsonl:FILE likewise
    package.module:Class               a data set of your own: see `datasets`

`?file=PATH` reads a named data set from another file or directory, `?split=NAME` selects a split (`train`,
`train+unknown`, `train[:10%]`). A relative FILE is looked up in the current directory, then in data_dir;
`hf://OWNER/NAME/FILE` is a file on the hub.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from unidetox_jax.data import datasets, files
from unidetox_jax.data.texts import Texts
from unidetox_jax.errors import UserError, suggest


class Spec(NamedTuple):
    """A parsed spec, `name:argument?key=value&key=value`, and the class that reads the data set."""

    name: str
    argument: str
    options: Mapping[str, str]
    dataset: Any


@dataclasses.dataclass(frozen=True)
class Records(Sequence):
    """The rows of one split, dictionaries in the file's order.

    `fingerprint` changes with the source's bytes, the options and the split.
    """

    spec: str
    split: str
    fingerprint: str
    rows: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def column(self, name: str) -> list[Any]:
        """One field of every row.

        Raises:
          UserError: the records have no such field; lists the existing ones.
        """
        if name not in self.rows[0]:
            raise UserError(f"{self.spec}: the records have no field {name!r}; found {', '.join(self.rows[0])}")
        return [row[name] for row in self.rows]


def load(
    spec: str, split: str | None = None, data_dir: epath.PathLike = "", cache_dir: epath.PathLike | None = None
) -> Records:
    """The records of a data set, prepared on first use.

    Args:
      spec: see the module docstring.
      split: overrides the spec's `?split=`; without either, the data set's default (dghs and files train, toxigen test,
        mmlu validation).
      data_dir: where named data sets are, as `data_dir/NAME/…`; empty: the hub.
      cache_dir: where prepared data sets are stored; None: `default_cache_dir()`.

    Raises:
      UserError: an unknown data set or split; a file that is missing, empty, undecodable or lacks a column.
    """
    parsed = parse_spec(spec)
    dataset, argument = parsed.dataset, parsed.argument
    if dataset.columns is not None:
        options = {**dataset.columns, **{key: value for key, value in parsed.options.items() if key != "split"}}
    else:
        options = {argument: True} if argument in dataset.variants else {}
    prepared = dataset(_contents(parsed, data_dir), options, epath.Path(cache_dir or default_cache_dir()))
    prepared.prepare()
    split = split or parsed.options.get("split") or dataset.default_split
    return Records(spec, split, f"{prepared.fingerprint}-{split}", tuple(prepared.read(split)))


def texts(
    spec: str, split: str | None = None, data_dir: epath.PathLike = "", cache_dir: epath.PathLike | None = None
) -> Texts:
    """The field `text` of every record of `load(…)`, with the other fields as metadata.

    Raises:
      UserError: as `load`; the records have no such field.
    """
    records = load(spec, split, data_dir, cache_dir)
    records.column("text")  # raises if there is none
    return Texts(records.rows)


def fingerprint(spec: str, data_dir: epath.PathLike = "") -> str:
    """A hash of the source's bytes and the spec's options, independent of the source's path; for `stage.json`."""
    parsed = parse_spec(spec)
    variant = parsed.argument if parsed.argument in parsed.dataset.variants else ""
    options = sorted((name, value) for name, value in parsed.options.items() if name != "file")
    return files.content_hash(_contents(parsed, data_dir), parsed.name, variant, options)


def default_cache_dir() -> epath.Path:
    """`$XDG_CACHE_HOME/unidetox_jax/tfds`, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or epath.Path("~/.cache").expanduser()
    return epath.Path(root) / "unidetox_jax" / "tfds"


def is_spec(text: str) -> bool:
    """Whether a text is a data set's spec rather than a path."""
    name = text.partition("?")[0]
    return name.partition(":")[0] in datasets.DATASETS or datasets.is_outside(name)


def parse_spec(spec: str) -> Spec:
    """Parses and checks a spec.

    Raises:
      UserError: an unknown name, variant or option; suggests the closest known one.
    """
    body, _, query = spec.partition("?")
    name, colon, argument = (body, "", "") if datasets.is_outside(body) else body.partition(":")
    dataset = datasets.get(name)
    pairs = [part.partition("=") for part in query.split("&")] if query else []
    for pair in pairs:
        if not all(pair):
            raise UserError(f"{spec!r}: found option {''.join(pair)!r}, expected key=value")
    options = {key: value for key, _, value in pairs}
    if not dataset.patterns and not argument:
        raise UserError(f"{spec!r}: expected {name}:FILE")
    if dataset.patterns and colon and argument not in dataset.variants:
        hint = suggest(argument, dataset.variants) if dataset.variants else " (it has none)"
        raise UserError(f"{spec!r}: no variant {argument!r} of {name}{hint}; a file is written {name}?file=PATH")
    known = {"split", "file"} if dataset.patterns else {"split"}
    unknown = sorted(options.keys() - known) if dataset.columns is None else []
    if unknown:
        raise UserError(f"{spec!r}: no option {unknown[0]!r}{suggest(unknown[0], known)}")
    return Spec(name, argument, options, dataset)


def _contents(spec: Spec, data_dir: epath.PathLike) -> tuple[files.Content, ...]:
    dataset = spec.dataset
    if not dataset.patterns:
        return files.read([files.find(spec.argument, data_dir)])
    if "file" in spec.options:
        path = files.find(spec.options["file"], data_dir)
    elif str(data_dir):
        path = epath.Path(data_dir) / dataset.name
        if not path.exists():
            raise UserError(f"data_dir: no directory {path} for the data set {spec.name!r}")
    elif dataset.hub:
        return files.read([files.download(dataset.hub, name) for name in dataset.hub_files])
    else:
        raise UserError(f"the data set {spec.name!r} is not on the hub: set data_dir, or write {spec.name}?file=PATH")
    return files.read(files.find_matching(path, dataset.patterns) if path.is_dir() else [path])
