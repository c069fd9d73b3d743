"""TFDS data sets without TensorFlow: prepared once as array_record files, read at random.

TFDS reuses whatever was prepared under the same name, config and version. The config's name here is the hash of the
source's bytes and of the options, so an edited file is another data set and the old one stays beside it.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from unidetox_jax.data import files
from unidetox_jax.data.files import Content
from unidetox_jax.errors import UserError

TEXT, TEXTS, FLOAT, INT, BOOL = "text", "texts", "float", "int", "bool"
_FEATURES = {
    TEXT: tfds.features.Text,
    TEXTS: lambda: tfds.features.Sequence(tfds.features.Text()),
    FLOAT: lambda: tfds.features.Scalar(np.float32),
    INT: lambda: tfds.features.Scalar(np.int64),
    BOOL: lambda: tfds.features.Scalar(np.bool_),
}


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set made of source files that were read already; subclasses say what their rows are.

    A subclass sets `name`, `fields` (name → TEXT, TEXTS, FLOAT, INT or BOOL) and `examples`.
    """

    VERSION = tfds.core.Version("1.0.1")  # raise it when the parsing of the same bytes changes
    fields: Mapping[str, str] = {}
    default_split: ClassVar[str] = "train"
    split_aliases: ClassVar[Mapping[str, str]] = {}

    def __init__(self, contents: tuple[Content, ...], options: Mapping[str, Any], cache_dir: epath.PathLike):
        self.contents = contents
        self.options = dict(options)
        self.fingerprint = files.content_hash(contents, self.name, str(self.VERSION), sorted(self.options.items()))
        with _quiet():
            super().__init__(
                data_dir=os.fspath(cache_dir),
                config=tfds.core.BuilderConfig(name=self.fingerprint, description=contents[0].stem),
                file_format="array_record",
            )

    def examples(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(split, row) for every row that belongs to the data set, in order."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: _FEATURES[kind]() for name, kind in self.fields.items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        splits: dict[str, list[Mapping[str, Any]]] = {}
        for split, row in self.examples():
            splits.setdefault(split, []).append(row)
        if not splits:
            raise UserError(f"{self.contents[0].name}: no row is left for the data set {self.name!r}")
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(self, rows: Iterable[Mapping[str, Any]]):
        yield from enumerate(rows)

    def _log_download_bytes(self) -> None:  # TFDS prints to stdout, which belongs to results
        logging.info("preparing %s (%s)", self.name, self.contents[0].name)

    def _log_download_done(self) -> None:
        pass

    def prepare(self) -> None:
        """Writes the array_record files unless they are there.

        Raises:
          UserError: nothing is left of the source, or the cache cannot be written.
        """
        try:
            with _quiet():
                self.download_and_prepare()
        except (OSError, RuntimeError) as error:  # array_record's writer knows no other error than RuntimeError
            if epath.Path(self.data_dir, "dataset_info.json").exists():  # another process was first
                self.info.read_from_directory(self.data_dir)
                return
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._data_dir_root}: prepared data cannot be written there ({reason}); "
                "make room, or set cache_dir or XDG_CACHE_HOME"
            ) from None

    def read(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split (`train`, `train+unknown`, `train[:10%]`), decoded.

        Raises:
          UserError: no such split; those found are listed.
        """
        wanted = "+".join(self._split_name(name) + part for name, part in files.split_terms(split))
        # TFDS's own decoding takes half a millisecond a row; its protocol buffer alone takes ten microseconds.
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            if not self.info.splits[wanted].num_examples:
                raise UserError(f"{self.contents[0].name}: split {split!r} is empty")
            with _quiet():
                source = self.as_data_source(split=wanted, deserialize_method=raw_bytes)
        except (ValueError, AssertionError) as error:
            raise UserError(f"split {split!r}: {' '.join(str(error).split())[:160]}") from None
        return [self._decode(record) for record in source.__getitems__(range(len(source)))]

    def _split_name(self, name: str) -> str:
        found = {split: info.num_examples for split, info in self.info.splits.items()}
        name = name if name in found else self.split_aliases.get(name, name)
        if name not in found:
            counts = ", ".join(f"{split} ({count} rows)" for split, count in found.items())
            raise UserError(f"{self.contents[0].name}: no split {name!r}; found {counts}")
        return name

    def _decode(self, record: bytes) -> dict[str, Any]:
        features = tf_example_pb2.Example.FromString(record).features.feature
        return {name: _DECODERS[kind](features[name]) for name, kind in self.fields.items()}


_DECODERS = {
    TEXT: lambda feature: feature.bytes_list.value[0].decode(),
    TEXTS: lambda feature: tuple(value.decode() for value in feature.bytes_list.value),
    FLOAT: lambda feature: feature.float_list.value[0],
    INT: lambda feature: feature.int64_list.value[0],
    BOOL: lambda feature: bool(feature.int64_list.value[0]),
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS warns of every config that is not in its own list, and shows bars that flicker past."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
