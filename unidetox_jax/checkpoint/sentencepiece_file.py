"""Converts a sentencepiece `tokenizer.model` to the `tokenizers` library, token for token.

One library then serves every kind of tokenizer, and exported models have a `tokenizer.json`, which every reader takes.
"""

from collections.abc import Mapping

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from unidetox_jax.errors import UserError

SPACE = "▁"
BPE = 2  # TrainerSpec.ModelType; unigram models would tokenise differently where scores tie
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # SentencePiece.Type
# What conversions get wrong: spaces anywhere, repeated characters, bytes, normalised characters
PROBES = (
    "Hello",
    " Hello",
    "  two  spaces \t and\ttabs,\n\na line ",
    "Don't; it's 3,141.59 (or 2^10)... ====== ------- aaaaaaa",
    "naïve Ünïcödé ﬁ ½ ㎏ Ａ e\u0301 日本語 العربية हिन्दी 한국어 😀👩\u200d👩\u200d👧 \u00a0\u3000\u2581",
    "def f(x):\n        return [x ** 2 for _ in range(10)]  # code\r\n",
)


def read(path: epath.Path, added: Mapping[int, AddedToken]) -> tuple[Tokenizer, dict[str, str]]:
    """(tokenizer, special tokens by role: `bos_token`, …).

    Args:
      added: tokens that other files add, by id.

    Raises:
      UserError: not a sentencepiece BPE model, or one that the conversion tokenises differently.
    """
    content = path.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made by protobuf at run time
    try:
        proto.ParseFromString(content)
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # protobuf and sentencepiece share no exception class
        raise UserError(f"{path}: not a sentencepiece model ({' '.join(str(error).split())[:80]})") from None
    if proto.trainer_spec.model_type != BPE:
        raise UserError(f"{path}: found a sentencepiece model other than BPE; put a tokenizer.json beside it")
    tokenizer = Tokenizer(_model(proto, added, original.unk_id()))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    tokens = [
        AddedToken(piece.piece, special=piece.type == CONTROL, normalized=False)
        for piece in proto.pieces
        if piece.type in (CONTROL, USER_DEFINED)
    ]
    tokens += [added[index] for index in sorted(added) if index != original.unk_id()]  # "<unk>" in a text is plain text
    tokenizer.add_tokens(tokens)
    for probe in PROBES:
        expected, found = original.encode(probe), tokenizer.encode(probe, add_special_tokens=False).ids
        if found != expected:
            raise UserError(
                f"{path}: {probe!r} became {found}, but sentencepiece gives {expected}; put a tokenizer.json beside it"
            )
    ids = {"bos_token": original.bos_id(), "eos_token": original.eos_id(), "unk_token": original.unk_id()}
    ids["pad_token"] = original.pad_id()
    return tokenizer, {role: original.id_to_piece(index) for role, index in ids.items() if index >= 0}


def _model(proto, added: Mapping[int, AddedToken], unknown: int) -> models.BPE:
    names = {index: piece.piece for index, piece in enumerate(proto.pieces)}
    names |= {index: token.content for index, token in added.items()}
    vocabulary = {name: index for index, name in names.items()}
    normal = [piece for index, piece in enumerate(proto.pieces) if piece.type == NORMAL and index not in added]
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):  # stable: equal scores stay in order of ids
        pairs = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
        merges += [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
    fallback = bool(proto.trainer_spec.byte_fallback)
    return models.BPE(vocabulary, merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=fallback)


def _normalizer(spec) -> normalizers.Normalizer | None:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
