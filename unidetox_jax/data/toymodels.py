"""Tokenizers and `config.json` files of tiny models for the built-in world; weights are trained later.

The four families' vocabularies differ as the published ones do: byte-level BPE with `<|endoftext|>` for everything
(GPT-2, Falcon) or with `</s>` at both ends and `<pad>` 1 (OPT), and sentencepiece-like pieces with `<s>` and `</s>`
(LLaMA). A fifth model, of another shape and vocabulary, is the independent perplexity scorer. All tokenizers add BOS,
GPT-2's and Falcon's too: the method samples from BOS alone, so these models must have seen what follows it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from unidetox_jax import storage

END = "<|endoftext|>"
MAX_POSITIONS = 128
TOKENIZER_TEXTS = 4_000  # enough to see every word many times


@dataclasses.dataclass(frozen=True)
class ToyModel:
    """A tokenizer's kind and size, and the model's configuration without the fields that the tokenizer determines."""

    config: dict[str, Any]
    vocab_size: int
    specials: tuple[str, ...]  # ids 0, 1, 2 …; GPT-2's comes last, as in the published vocabulary
    bos: str
    eos: str
    pad: str | None = None
    unk: str | None = None
    spaces: str = "bytes"  # "bytes" (GPT-2's alphabet) or "pieces" (sentencepiece's)


_GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4,
    "n_positions": MAX_POSITIONS, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
_OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 128, "word_embed_proj_dim": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 512, "do_layer_norm_before": True,
    "max_position_embeddings": MAX_POSITIONS, "activation_function": "relu", "dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
_FALCON = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True,
    "bias": False, "alibi": False, "new_decoder_architecture": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "max_position_embeddings": MAX_POSITIONS,
}  # fmt: skip
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
    "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
_SENTENCEPIECE: dict[str, Any] = {
    "specials": ("<unk>", "<s>", "</s>"), "bos": "<s>", "eos": "</s>", "unk": "<unk>", "spaces": "pieces",
}  # fmt: skip

MODELS = {
    "gpt2": ToyModel(_GPT2, 640, (END,), END, END),
    "opt": ToyModel(_OPT, 720, ("<s>", "<pad>", "</s>", "<unk>"), "</s>", "</s>", "<pad>", "<unk>"),
    "falcon": ToyModel(_FALCON, 576, (">>TITLE<<", END), END, END),
    "llama": ToyModel(_LLAMA, 512, **_SENTENCEPIECE),
    "scorer": ToyModel({**_LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2}, 800, **_SENTENCEPIECE),
}


# Further families, all with LLaMA's tokenizer
_COMMON = {name: _LLAMA[name] for name in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
)} | {"pad_token_id": None}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WINDOW = {"sliding_window": 12}  # a third of a text
_GEMMA = {**_GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32}
OTHER_FAMILIES = {
    name: ToyModel({"model_type": name, **config}, 512, **_SENTENCEPIECE)
    for name, config in {
        "mistral": {**_GROUPED, **_WINDOW},
        "qwen2": _GROUPED,
        "qwen3": {**_GROUPED, "head_dim": 32},
        "gemma": {**_GROUPED, "head_dim": 32},
        "gemma2": {**_GEMMA, **_WINDOW},
        "gemma3_text": {**_GEMMA, **_WINDOW, "sliding_window_pattern": 2},
        "olmo2": _COMMON,
        "olmo3": {**_COMMON, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        "phi3": {**_COMMON, "partial_rotary_factor": 0.75},
        "gpt_neox": {**_COMMON, "rotary_pct": 0.25},
    }.items()
}


def write(directory: epath.Path, texts: Sequence[str]) -> None:
    """Writes `directory/NAME/{config.json,tokenizer.json,tokenizer_config.json}` for all models.

    Args:
      texts: the tokenizers' training corpus; the same corpus gives the same files.
    """
    tokenizers: dict[tuple[int, str], Tokenizer] = {}
    for name, toy in (MODELS | OTHER_FAMILIES).items():
        kind = (toy.vocab_size, toy.spaces)
        tokenizer = tokenizers[kind] = tokenizers.get(kind) or make_tokenizer(toy, texts[:TOKENIZER_TEXTS])
        ids = {role: tokenizer.token_to_id(token) for role, token in _roles(toy).items()}
        model_directory = epath.Path(directory) / name
        storage.write_text(model_directory / "tokenizer.json", tokenizer.to_str(pretty=True))
        storage.write_text(model_directory / "tokenizer_config.json", json.dumps(_tokenizer_config(toy), indent=2))
        config = {
            **toy.config,
            "vocab_size": tokenizer.get_vocab_size(),
            "torch_dtype": "float32",
            **{f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids},
        }
        storage.write_text(model_directory / "config.json", json.dumps(config, indent=2))


def make_tokenizer(toy: ToyModel, texts: Sequence[str]) -> Tokenizer:
    """A BPE tokenizer of `toy`'s kind, trained on `texts`."""
    first = () if toy.specials == (END,) else toy.specials  # GPT-2's end of text comes last
    if toy.spaces == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=toy.vocab_size - (not first), special_tokens=list(first), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(list(toy.specials))
    else:
        tokenizer = _sentencepiece_like(toy, texts)
    bos = (toy.bos, tokenizer.token_to_id(toy.bos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{toy.bos} $A", pair=f"{toy.bos} $A {toy.bos} $B", special_tokens=[bos]
    )
    return tokenizer


def _sentencepiece_like(toy: ToyModel, texts: Sequence[str]) -> Tokenizer:
    """Pieces with a leading `▁`, and a token per byte for characters that the corpus lacks."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    learner = Tokenizer(models.BPE(unk_token=toy.unk))
    learner.pre_tokenizer = spaces
    size = toy.vocab_size - len(byte_tokens)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(toy.specials), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    count = len(toy.specials)
    order = [*pieces[:count], *byte_tokens, *pieces[count:]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(order)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=toy.unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = spaces
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(list(toy.specials))
    return tokenizer


def _roles(toy: ToyModel) -> dict[str, str]:
    roles = {"bos": toy.bos, "eos": toy.eos, "pad": toy.pad, "unk": toy.unk}
    return {role: token for role, token in roles.items() if token is not None}


def _tokenizer_config(toy: ToyModel) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
        **{f"{role}_token": token for role, token in _roles(toy).items()},
    }
