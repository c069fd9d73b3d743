"""Every published config.json there is a copy of, and older versions' spellings: read, or refused for a reason."""

import importlib.util
import json
import pathlib
import re

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unidetox_jax import models
from unidetox_jax.errors import UserError
from unidetox_jax.models import config as reading
from unidetox_jax.models.registry import FAMILIES
from unidetox_jax.models.rotary import Rotary

FOREIGN = rf"model_type '\w[\w-]*' is not implemented \(known: {', '.join(FAMILIES)}\)"
# Configs of our families that are refused: by which folder they are known, and why.
REFUSED = {
    "itsnsreehari-KV260-Accelerated-Platform--gpt2": "quantization_config = .*is not implemented",  # GPTQ, 4 bits
    # Its own class replaces every feed-forward layer by experts
    "alibaba-Pai-Megatron-Patch--toolkits-model_checkpoints_convertor-llama-hf_llama_moe": "'LlamaMoeForCausalLM' is",
}
OURS = re.compile(f"{'|'.join(FAMILIES)}|RefinedWeb(Model)?")
GPT2 = {"model_type": "gpt2", "vocab_size": 131, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "layer_norm_epsilon": 1e-5}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 131, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
RELEASED_FALCON = {"model_type": "RefinedWeb", "architectures": ["RWForCausalLM"], "vocab_size": 131, "hidden_size": 32,
                   "n_layer": 2, "n_head": 8, "bias": False, "alibi": False}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def read(config, **changes):
    return models.config_from_hf({**config, **changes})


@pytest.fixture(scope="module")
def hub(shared):
    """Folder's name → its config."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(shared.glob("hub/*/config.json"))}
    assert found
    return found


def test_every_config_is_read_or_refused_for_a_reason(hub):
    outcomes = {}
    for name, config in hub.items():
        try:
            models.config_from_hf(config)
            outcomes[name] = None
        except UserError as error:
            outcomes[name] = str(error)
    refused = {name: reason for name, reason in outcomes.items() if reason}
    foreign = {name for name, reason in refused.items() if re.search(FOREIGN, reason)}
    assert refused.keys() - foreign == REFUSED.keys()
    assert all(re.search(reason, refused[name]) for name, reason in REFUSED.items())
    assert not any(OURS.fullmatch(hub[name]["model_type"]) for name in foreign)
    read = [hub[name] for name, reason in outcomes.items() if not reason]
    assert len(read) == 151
    assert {config.get("model_type") for config in read} >= FAMILIES.keys() - {"gemma2", "olmo2", "olmo3"}
    assert sum("model_type" not in config for config in read) == 5
    assert sum(config.get("model_type", "").startswith("RefinedWeb") for config in read) == 7


def test_what_is_read_is_written_and_read_again(hub):
    for name, config in hub.items():
        if OURS.fullmatch(config.get("model_type", "gpt2")) and name not in REFUSED:
            cfg = models.config_from_hf(config)
            assert models.config_from_hf(models.config_to_hf(cfg)) == cfg, name


# What the modelling files read beside the options of a causal model: heads of other tasks, how a call is made, a model
# of images, and head_dim, which is computed where it is no option.
ELSEWHERE = set(
    "_attn_implementation num_labels problem_type classifier_dropout hidden_dropout summary_type summary_use_proj "
    "summary_activation summary_proj_to_labels summary_first_dropout summary_last_dropout use_cache dtype "
    "output_attentions output_hidden_states return_dict head_dim "
    "get_text_config text_config vision_config image_token_id mm_tokens_per_image is_decoder".split()
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_line_is_where_transformers_draws_it(family):
    """What the modelling file reads is read or must be off; what is read is an option of the config class."""
    name = family.removesuffix("_text")
    spec = importlib.util.find_spec(f"transformers.models.{name}.modeling_{name}")
    source = pathlib.Path(spec.origin).read_text()
    cls, module = CONFIG_MAPPING[family], FAMILIES[family]
    named = re.findall(r"\bconfig\.(\w+)", source) + re.findall(r"getattr\(config, \"(\w+)\"", source)
    used = {cls.attribute_map.get(name, name) for name in named}
    known = {*reading.READ, *module.READ, *getattr(module, "OFF", ())}
    assert len(used) >= 15 and used <= {*known, "rope_parameters", *ELSEWHERE}
    assert known <= cls.__dataclass_fields__.keys()


def test_what_is_not_read_is_named_in_one_line(caplog):
    with caplog.at_level("INFO", logger="absl"):
        cfg = read(GPT2, output_past=True, max_length=50, _num_labels=1, vocab="file", use_cache=True, summary_type="x")
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == [
        "config.json: ignored, since gpt2 does not read them: output_past, max_length, _num_labels, vocab, summary_type"
    ]
    assert cfg == read(GPT2)
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):
        models.config_from_hf(models.config_to_hf(cfg))
    assert not [record for record in caplog.records if record.name == "absl"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True is not implemented for gpt2"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config = .*give the unquantized checkpoint"),
        (LLAMA, {"quantization": {"group_size": 64, "bits": 4}}, "quantization = .*give the unquantized checkpoint"),
        ({"model_type": "opt"}, {"layerdrop": 0.1}, "layerdrop = 0.1 is not implemented for opt"),
        (GPT2, {"architectures": ["GPT2LMHeadCustomModel"]}, "architecture 'GPT2LMHeadCustomModel' is other code"),
        (GPT2, {"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM' is other code than .* gpt2"),
        (GPT2, {"model_type": "bloom"}, FOREIGN),
        (GPT2, {"model_type": None, "afn": "gelu"}, "model_type None is not implemented"),  # GPT-1
        (GPT2, {"model_type": None, "architectures": ["GPTJForCausalLM"]}, "model_type None is not implemented"),
        (GPT2, {"n_layer": "three"}, "config.json: .*n_layer"),
        (LLAMA, {"rope_scaling": {"type": "ntk", "factor": 4.0}}, "rope_type 'ntk' is not implemented"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 2.0}}, "mscale = 2.0 of rope_type 'yarn'"),
        ({"model_type": "gemma3_text"}, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
        ({"model_type": "olmo3"}, {"layer_types": ["linear_attention"] * 32}, "layer_types .*linear_attention"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": None}}, "rope_type 'linear' needs factor"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not implemented"),
    ],
)
def test_what_changes_the_model_is_refused_by_name(config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read(config, **changes)
    assert "\n" not in str(error.value)


def test_a_config_that_is_no_dictionary(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="config.json: found a list, expected"):
        models.config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": []}, (None, (), None)),
        ({"eos_token_id": None}, (None, (), None)),
        ({"eos_token_id": [2, 3, 4], "pad_token_id": 0}, (2, (3, 4), 0)),
        ({"eos_token_ids": [7]}, (7, (), None)),
        ({"eos_token_ids": 7, "eos_token_id": 5}, (5, (), None)),
        ({"eos_token_ids": 0}, (50256, (), None)),  # transformers 2.3 wrote so into every config
        ({"eos_token_id": 2, "pad_token_id": -1}, (2, (), None)),
        ({"eos_token_id": 2, "pad_token_id": 131}, (2, (), None)),
        ({"eos_token_id": 2, "pad_token_id": 130}, (2, (), 130)),
    ],
)
def test_special_tokens(changes, expected):
    cfg = read(GPT2, **changes)
    assert (cfg.eos_token_id, cfg.extra_eos_token_ids, cfg.pad_token_id) == expected
    again = models.config_from_hf(models.config_to_hf(cfg))
    assert again == cfg and again.eos_token_ids == cfg.eos_token_ids


def test_older_spellings():
    plain = {key: value for key, value in GPT2.items() if key != "model_type"}
    assert models.config_from_hf(plain) == read(GPT2)
    assert read(LLAMA, model_type=None, architectures=["LLaMAForCausalLM"]) == read(LLAMA)
    opt = {"model_type": "opt", "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 32}
    assert read(opt, d_model=32) == read(opt, hidden_size=32)
    assert read(opt, d_model=64, hidden_size=32) == read(opt, hidden_size=32)
    assert read(LLAMA, attention_bias=None, rope_scaling=None, rope_theta=None) == read(LLAMA)


def test_falcon_before_transformers_had_it():
    small = read(RELEASED_FALCON, multi_query=True, parallel_attn=True)  # 7b
    assert (small.num_layers, small.num_heads, small.num_kv_heads, small.head_size) == (2, 8, 1, 4)
    assert small.multi_query and small.parallel and not small.new_decoder and not small.separate_norms
    large = read(RELEASED_FALCON, n_head_kv=2, parallel_attn=True)  # 40b
    assert large.new_decoder and large.separate_norms and large.parallel and large.num_kv_heads == 2
    sequential = read(RELEASED_FALCON, alibi=True, bias=True)  # rw-1b
    assert sequential.alibi and not sequential.parallel and sequential.num_kv_heads == 8
    for cfg in (small, large, sequential):
        assert models.config_to_hf(cfg)["model_type"] == "falcon"
        assert models.config_from_hf(models.config_to_hf(cfg)) == cfg


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"kind": "linear", "factor": 4.0}),
        ({"rope_type": "linear", "type": "linear", "factor": 4, "finetuned": True}, {"kind": "linear", "factor": 4.0}),
        ({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}, {"kind": "dynamic", "factor": 2.0}),
        ({"rope_type": "default"}, {"kind": "default"}),
        ({"rope_type": "default", "factor": 8.0}, {"kind": "default"}),
        (LLAMA3, {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}),
    ],
)
def test_forms_of_rope_scaling(where, scaling, expected):
    expected = Rotary(theta=500.0, **{"original_max_position_embeddings": 64, **expected})
    theirs = {"rope_parameters": {**scaling, "rope_theta": 500.0}}
    cfg = read(LLAMA, **(theirs if where == "rope_parameters" else {"rope_scaling": scaling, "rope_theta": 500.0}))
    assert cfg.rotary == expected
    assert models.config_from_hf(models.config_to_hf(cfg)).rotary == expected


PUBLISHED_FILES = {
    "openai-community/gpt2": ["published--history-openai-community--gpt2-26b7c7a6", "AbisoyeOnanuga-beebe--gpt2"],
    "openai-community/gpt2-large": ["published--resaved-openai-community--gpt2-large__tf5.0.0"],
    "openai-community/gpt2-xl": ["gpt2-xl", "published--A-openai-community--gpt2-xl"],
    "facebook/opt-125m": ["published--A-facebook--opt-125m"],
    "facebook/opt-1.3b": ["published--history-facebook--opt-1.3b-f39e4974"],
    "facebook/opt-6.7b": ["SqueezeAILab-SqueezeLLM--models-opt-6.7b"],
    "tiiuae/falcon-7b": ["published--A-tiiuae--falcon-7b", "published--A-tiiuae--falcon-7b-instruct"],
    "meta-llama/Llama-2-7b-hf": ["published--A-meta-llama--Llama-2-7b-hf"],
    "meta-llama/Llama-3.1-8B": ["published--A-meta-llama--Llama-3.1-8B-Instruct"],
    "meta-llama/Llama-3.1-70B": ["published--A-meta-llama--Llama-3.1-70B-Instruct"],
    "meta-llama/Llama-3.2-1B": ["published--A-meta-llama--Llama-3.2-1B"],
    "meta-llama/Llama-3.2-3B": ["published--resaved-meta-llama--Llama-3.2-3B__tf4.47.1"],
    "mistralai/Mistral-7B-v0.1": ["published--B-mistralai--Mistral-7B-v0.1"],
    "mistralai/Mistral-7B-v0.3": ["published--B-mistralai--Mistral-7B-Instruct-v0.3"],
    "Qwen/Qwen2.5-0.5B": ["published--B-Qwen--Qwen2.5-0.5B"],
    "Qwen/Qwen2.5-7B-Instruct": ["published--B-Qwen--Qwen2.5-7B-Instruct"],
    "Qwen/Qwen3-0.6B": ["published--B-Qwen--Qwen3-0.6B"],
    "Qwen/Qwen3-1.7B": ["published--B-Qwen--Qwen3-1.7B"],
    "Qwen/Qwen3-4B": ["published--B-Qwen--Qwen3-4B"],
    "Qwen/Qwen3-8B": ["published--B-Qwen--Qwen3-8B"],
    "google/gemma-2b": ["published--B-google--gemma-2b-it"],
    "google/gemma-3-1b-pt": ["published--B-google--gemma-3-1b-it"],
}
# Of those of which there is no file: how many parameters their authors count.
COUNTED = {
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-2-2b": 2_614_341_888,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
}


@pytest.mark.parametrize("hub_id", COUNTED)
def test_what_is_built_in_has_the_size_that_was_published(hub_id):
    assert models.num_params(models.published_config(hub_id)) == COUNTED[hub_id]


@pytest.mark.parametrize("hub_id", PUBLISHED_FILES)
def test_what_is_built_in_is_what_was_published(hub_id, hub):
    ours, cfg = models.PUBLISHED[hub_id], models.published_config(hub_id)
    options = {*reading.READ, *reading.ROPE, *FAMILIES[cfg.family].READ, *getattr(FAMILIES[cfg.family], "OFF", ())}
    for name in PUBLISHED_FILES[hub_id]:
        theirs = dict(hub[name])
        if isinstance(theirs["eos_token_id"], list):  # an instruction model's, which ends a turn, too
            theirs["eos_token_id"] = theirs["eos_token_id"][0]
        assert models.config_from_hf(theirs) == cfg
        if "resaved" not in name:  # which writes transformers' defaults as well
            assert {key: value for key, value in theirs.items() if key in options}.items() <= ours.items()
