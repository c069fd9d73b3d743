"""Data sets by a short text, and one function that loads them all.

    dghs            dghs:official      a named data set, and a variant of it
    toxigen         mmlu               looked up in data_dir/NAME, else fetched from the hub
    realtoxicityprompts   politics
    text:FILE                          a text a line
    distilled:FILE                     csv with the column Text, or jsonl with the field text
    csv:FILE?text=COLUMN&label=COLUMN  fields of the records from columns; jsonl:FILE likewise

`?file=PATH` gives a named data set another file or directory, `?split=NAME` a split (`train`, `train+unknown`,
`train[:10%]`). A relative FILE is looked up here, then in data_dir; `hf://OWNER/NAME/FILE` is a file on the hub.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from unidetox_jax.data import builders, corpora, dghs, files, mmlu, toxigen
from unidetox_jax.data.texts import Texts
from unidetox_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Named:
    """A data set that has a name: its builder, its files in `data_dir/NAME` and on the hub, its variants."""

    builder: type[builders.RecordBuilder]
    preferences: tuple[tuple[str, ...], ...]
    hub: str = ""  # repository of data sets; empty: not there
    hub_files: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()


NAMED = {
    "dghs": Named(dghs.Dghs, dghs.PREFERENCES, dghs.HUB, dghs.HUB_FILES, ("official",)),
    "toxigen": Named(toxigen.Toxigen, toxigen.PREFERENCES, toxigen.HUB, toxigen.HUB_FILES),
    "mmlu": Named(mmlu.Mmlu, mmlu.PREFERENCES, mmlu.HUB, mmlu.HUB_FILES),
    "realtoxicityprompts": Named(
        corpora.RealToxicityPrompts, (("prompts*.jsonl",),), "allenai/real-toxicity-prompts", ("prompts.jsonl",)
    ),
    "politics": Named(corpora.Politics, (("*.jsonl",),)),
}
FILES = {"text": corpora.Text, "distilled": corpora.Distilled, "csv": corpora.Table, "jsonl": corpora.Table}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A data set's text, taken apart: `name:argument?key=value&key=value`."""

    name: str
    argument: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Records(Sequence):
    """The rows of one split, in the file's order.

    `records[i]` is a dictionary; `fingerprint` changes with the source's bytes, the options and the split.
    """

    spec: str
    split: str
    fingerprint: str
    rows: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def column(self, name: str) -> list[Any]:
        """One field of every row.

        Raises:
          UserError: the records have no such field; those found are listed.
        """
        if name not in self.rows[0]:
            raise UserError(f"{self.spec}: the records have no field {name!r}; found {', '.join(self.rows[0])}")
        return [row[name] for row in self.rows]

    @property
    def texts(self) -> Texts:
        """The field `text` of every record, with what else is known of each.

        Raises:
          UserError: the records have no such field.
        """
        self.column("text")  # raises where there is none
        return Texts(self.rows)

    def ended(self) -> list[bool] | None:
        """Whether each text ended by itself; None where the data set does not say: take it that all did."""
        return self.texts.ended


def load(
    spec: str, split: str | None = None, data_dir: epath.PathLike = "", cache_dir: epath.PathLike | None = None
) -> Records:
    """The records of a data set, prepared on first use.

    Args:
      spec: see this module's head.
      split: goes before the spec's own `?split=`; None and none there: the data set's default (dghs and files train,
        toxigen test, mmlu validation).
      data_dir: where named data sets lie, as `data_dir/NAME/…`; empty: the hub.
      cache_dir: where prepared data sets are kept; None: `default_cache_dir()`.

    Raises:
      UserError: an unknown data set or split, a file that is missing, empty, undecodable or lacks a column.
    """
    parsed = parse_spec(spec)
    builder = _builder(parsed, data_dir, cache_dir)
    builder.prepare()
    split = split or parsed.options.get("split") or builder.default_split
    return Records(spec, split, f"{builder.fingerprint}-{split}", tuple(builder.read(split)))


def texts(
    spec: str, split: str | None = None, data_dir: epath.PathLike = "", cache_dir: epath.PathLike | None = None
) -> list[str]:
    """The field `text` of every record of `load(…)`."""
    return load(spec, split, data_dir, cache_dir).column("text")


def fingerprint(spec: str, data_dir: epath.PathLike = "") -> str:
    """A few characters that change with the source's bytes and with what the spec asks of them, and not with where the
    source lies: an input of `stage.json`."""
    parsed = parse_spec(spec)
    variant = "" if parsed.name in FILES else parsed.argument
    options = sorted((name, value) for name, value in parsed.options.items() if name != "file")
    return files.content_hash(_contents(parsed, data_dir), parsed.name, variant, options)


def default_cache_dir() -> epath.Path:
    """`$XDG_CACHE_HOME/unidetox_jax/tfds`, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or epath.Path("~/.cache").expanduser()
    return epath.Path(root) / "unidetox_jax" / "tfds"


def is_spec(text: str) -> bool:
    """Whether a text begins as a data set's does (and is no plain path)."""
    return text.partition("?")[0].partition(":")[0] in {**NAMED, **FILES}


def parse_spec(spec: str) -> Spec:
    """A data set's text, taken apart and checked.

    Raises:
      UserError: an unknown name, variant or option; the nearest known one is named.
    """
    body, _, query = spec.partition("?")
    name, colon, argument = body.partition(":")
    options = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise UserError(f"{spec!r}: found the option {part!r}, expected key=value")
        options[key] = value
    known = {**NAMED, **FILES}
    if name not in known:
        raise UserError(f"no data set {spec!r}{suggest(name, known)}")
    if name in FILES and not argument:
        raise UserError(f"{spec!r}: expected {name}:FILE")
    if name in NAMED and colon and argument not in NAMED[name].variants:
        variants = NAMED[name].variants
        hint = suggest(argument, variants) if variants else " (it has none)"
        raise UserError(f"{spec!r}: no variant {argument!r} of {name}{hint}; a file is written {name}?file=PATH")
    allowed = {"split"} | ({"file"} if name in NAMED else set())
    if FILES.get(name) is not corpora.Table:
        for option in options:
            if option not in allowed:
                raise UserError(f"{spec!r}: no option {option!r}{suggest(option, allowed)}")
    return Spec(name, argument, options)


def _builder(spec: Spec, data_dir, cache_dir) -> builders.RecordBuilder:
    contents = _contents(spec, data_dir)
    cache_dir = epath.Path(cache_dir) if cache_dir else default_cache_dir()
    if spec.name in NAMED:
        return NAMED[spec.name].builder(contents, {spec.argument: True} if spec.argument else {}, cache_dir)
    builder = FILES[spec.name]
    columns = {}
    if builder is corpora.Table:
        columns = {"text": "text", **{key: value for key, value in spec.options.items() if key != "split"}}
    return builder(contents, columns, cache_dir)


def _contents(spec: Spec, data_dir) -> tuple[files.Content, ...]:
    if spec.name in FILES:
        return files.read([files.find(spec.argument, data_dir)])
    named = NAMED[spec.name]
    if "file" in spec.options:
        place = files.find(spec.options["file"], data_dir)
    elif str(data_dir):
        place = epath.Path(data_dir) / spec.name
        if not place.exists():
            raise UserError(f"data_dir: no directory {place} for the data set {spec.name!r}")
    elif named.hub:
        return files.read([files.download(named.hub, name) for name in named.hub_files])
    else:
        raise UserError(f"the data set {spec.name!r} is not on the hub: set data_dir, or write {spec.name}?file=PATH")
    return files.read(files.find_matching(place, named.preferences) if place.is_dir() else [place])
