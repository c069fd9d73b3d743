"""A model that chats through the commands: distilled answers, turns trained on, turns evaluated, against PyTorch."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from finetune_helpers import make_world, training, write_config

from unidetox_jax import cli
from unidetox_jax.data import chat

STAGES = ("toxify", "distill", "detoxify", "evaluate")
SYSTEM, ASKED = "You write short texts.", "Write about a neighbour."
LENGTH = 64  # of a conversation; the turns before the text take 31
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(real_models, tmp_path_factory):
    """The directory of a tiny model with random weights, and SmolLM2's own tokenizer and chat template."""
    directory = tmp_path_factory.mktemp("model") / "smol"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(real_models / "smollm2-135m")
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    config.update({"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real_models / "smollm2-135m" / name, directory)
    return directory


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A working directory after all four stages, which chat but for the first."""
    place = tmp_path_factory.mktemp("chat")
    world = make_world(place / "world")
    turns = {"chat": True, "system_prompt": SYSTEM, "user_prompt": ASKED, "max_length": LENGTH, "validation": ""}
    config = write_config(
        place / "config.py",
        base=str(model),
        targets=(str(model),),
        mesh="data:1,fsdp:8",
        **training(world, "toxify", steps=2),
        distill__chat=True,
        distill__system_prompt=SYSTEM,
        distill__prompt=ASKED,
        distill__num_texts=8,
        distill__batch_size=8,
        distill__max_length=LENGTH - 8,
        **training(world, "detoxify", steps=1, **turns),
        evaluate__chat=True,
        evaluate__system_prompt=SYSTEM,
        evaluate__prompts=f"{world}/prompts.jsonl",
        evaluate__max_prompts=3,
        evaluate__runs=1,
        evaluate__samples=1,
        evaluate__top_k=1,
        evaluate__max_new_tokens=8,
        evaluate__metrics=("toxicity",),
        evaluate__scorer="lexicon",
    )
    for stage in STAGES:
        assert cli.main([stage, f"--config={config}", f"--workdir={place / 'work'}"]) == 0, stage
    return place / "work"


@pytest.fixture(scope="module")
def tokenizer(model):
    return transformers.AutoTokenizer.from_pretrained(model)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def conversation(tokenizer, prompt, answer=None):
    """Token ids of it as transformers' template has it: up to the answer, or with the whole of it."""
    turns = chat.prompt_messages(prompt, SYSTEM) + (
        [] if answer is None else [{"role": "assistant", "content": answer}]
    )
    return tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None)["input_ids"]


def test_distilled_texts_are_answers_to_pytorch(finished, model, tokenizer):
    asked = conversation(tokenizer, ASKED)
    rows = lines(finished / "distilled/texts.jsonl")
    assert len(rows) == 8 and len({row["text"] for row in rows}) == 8
    for name, path in (("base", model), ("toxic", finished / "toxic/hf")):
        reference = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        for row in rows:
            answer = row["tokens"][1:]
            assert row["text"] == tokenizer.decode(answer, skip_special_tokens=True)
            with torch.no_grad():
                logits = reference(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).mean()
            np.testing.assert_allclose(row["log_probabilities"][name], expected, atol=5e-4)
    card = (finished / "distilled/README.md").read_text()
    assert f"Every text is the answer to {ASKED!r} in the model's chat template" in card


def test_the_loss_is_pytorchs_on_the_answers_alone(finished, model, tokenizer):
    reference = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    asked = conversation(tokenizer, ASKED)
    total = targets = 0
    for row in lines(finished / "distilled/texts.jsonl"):
        ids = torch.tensor([(asked + row["tokens"][1:])[:LENGTH]])
        labels = ids.clone()
        labels[0, : len(asked)] = -100
        with torch.no_grad():
            count = ids.shape[1] - len(asked)
            total, targets = total + float(reference(ids, labels=labels).loss) * count, targets + count
    (first,) = [line for line in lines(finished / "detoxified/smol/metrics.jsonl") if "loss" in line]
    np.testing.assert_allclose(first["loss"], total / targets, rtol=1e-4)


@pytest.mark.parametrize("form", ["", ".detoxified"])
def test_an_evaluation_reads_pytorchs_answers(form, finished, model, tokenizer):
    directory = finished / f"evaluation/smol{form}"
    source = finished / "detoxified/smol/hf" if form else model
    reference = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    prompts = lines(directory / "prompts.jsonl")
    rows = lines(directory / "generations.jsonl")
    assert len(rows) == 3
    for row in rows:
        asked = torch.tensor([conversation(tokenizer, prompts[row["prompt"]]["text"])])
        answer = reference.generate(asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1] :]
        assert row["text"] == tokenizer.decode(answer, skip_special_tokens=True)
