"""Base class of data sets: their fields, where their files are, and how those become rows.

TFDS without TensorFlow prepares a data set once, as random-access array_record files. TFDS reuses whatever was prepared
under the same name, config and version, so the config's name is a hash of the source's bytes and the options: an edited
file becomes a new data set.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from unidetox_jax.data import files
from unidetox_jax.errors import UserError

TEXT = tfds.features.Text()


class Dataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS is untyped
    """A data set, made from the content of its source files.

    Attributes:
      name: of its directory in data_dir and of its prepared files.
      fields: name → TFDS feature or NumPy type of each field of a row.
      patterns: groups of glob patterns within data_dir/NAME; the first group with a match is used. Empty: any file,
        written `NAME:FILE`.
      hub, hub_files: its repository on the hub, and its files there; empty: not on the hub.
      variants: names allowed after the colon; the chosen one becomes an option with value True.
      columns: field → default column, which an option may change; None: the data set takes no such options.
      default_split: used when none is given. split_aliases: other names of splits.
    """

    VERSION = tfds.core.Version("1.0.1")  # raise it when the parsing of the same bytes changes
    fields: Mapping[str, Any] = {}
    patterns: ClassVar[tuple[tuple[str, ...], ...]] = ()
    hub: ClassVar[str] = ""
    hub_files: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[Mapping[str, str] | None] = None
    default_split: ClassVar[str] = "train"
    split_aliases: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(skip_registration=True, **settings)  # TFDS's own registry is not used

    def __init__(self, contents: tuple[files.Content, ...], options: Mapping[str, Any], cache_dir: epath.PathLike):
        self.contents = contents
        self.options = dict(options)
        # Without VERSION, which TFDS tracks itself: existing working directories have recorded this hash
        self.fingerprint = files.content_hash(contents, self.name, "1.0.0", sorted(self.options.items()))
        with _quiet():
            super().__init__(
                data_dir=os.fspath(cache_dir),
                config=tfds.core.BuilderConfig(name=self.fingerprint, description=contents[0].basename),
                file_format="array_record",
            )

    def examples(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(split, row) for every row of the data set, in order."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self.fields))
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager
        splits: dict[str, list[Mapping[str, Any]]] = {}
        for split, row in self.examples():
            splits.setdefault(split, []).append(row)
        if not splits:
            raise UserError(f"{self.contents[0].name}: no row belongs to the data set {self.name!r}")
        return {split: enumerate(rows) for split, rows in splits.items()}

    def _generate_examples(self):
        raise NotImplementedError  # abstract in TFDS; `_split_generators` uses `examples`

    def _log_download_bytes(self) -> None:  # TFDS would print to stdout, which is for results
        logging.info("preparing %s (%s)", self.name, self.contents[0].name)

    def _log_download_done(self) -> None:
        pass

    def prepare(self) -> None:
        """Writes the array_record files unless they exist.

        Raises:
          UserError: no row belongs to the data set, or the cache cannot be written.
        """
        try:
            with _quiet():
                self.download_and_prepare()
        except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError for everything
            if epath.Path(self.data_dir, "dataset_info.json").exists():  # another process was first
                self.info.read_from_directory(self.data_dir)
                return
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._data_dir_root}: prepared data cannot be written ({reason}); "
                "free some space, or set cache_dir or XDG_CACHE_HOME"
            ) from None

    def read(self, split: str) -> list[dict[str, Any]]:
        """The decoded rows of a split (`train`, `train+unknown`, `train[:10%]`).

        Raises:
          UserError: no such split; lists the existing ones.
        """
        instruction = re.sub(r"\b[A-Za-z_]\w*", lambda match: self._split_name(match[0]), split)
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            if not self.info.splits[instruction].num_examples:
                raise UserError(f"{self.contents[0].name}: split {split!r} is empty")
            with _quiet():
                source = self.as_data_source(split=instruction, deserialize_method=raw_bytes)
        except (ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"split {split!r}: expected names like 'train', 'train+unknown' or 'train[:10%]' ({reason})"
            ) from None
        return [self._decode(record) for record in source.__getitems__(range(len(source)))]

    def _split_name(self, name: str) -> str:
        counts = {split: info.num_examples for split, info in self.info.splits.items()}
        name = name if name in counts else self.split_aliases.get(name, name)
        if name not in counts:
            listed = ", ".join(f"{split} ({count} rows)" for split, count in counts.items())
            raise UserError(f"{self.contents[0].name}: no split {name!r}; found {listed}")
        return name

    def _decode(self, record: bytes) -> dict[str, Any]:
        """A row. TFDS's own decoding takes half a millisecond, parsing the protocol buffer ten microseconds."""
        stored = tf_example_pb2.Example.FromString(record).features.feature
        return {name: _value(stored[name], self.info.features[name]) for name in self.fields}


def _value(stored: Any, feature: tfds.features.FeatureConnector) -> Any:
    values = getattr(stored, stored.WhichOneof("kind")).value
    if feature.np_dtype == np.object_:
        values = [value.decode() for value in values]
    elif feature.np_dtype == np.bool_:
        values = [bool(value) for value in values]
    return tuple(values) if feature.shape else values[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without TFDS's progress bars and its warning about every config it does not know."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
