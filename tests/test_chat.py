"""Chat: what a model is asked, answers and learns as the turns of a conversation, against transformers' templates."""

import numpy as np
import pytest
import torch
import transformers

from tests.eval_helpers import make_pair, make_tokenizer
from unidetox_jax import checkpoint, data, method, training
from unidetox_jax.data import chat
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations, perplexity
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.evaluation.metrics import Subject
from unidetox_jax.evaluation.prompts import from_texts
from unidetox_jax.stages import settings

# As Gemma's: BOS by itself, and no system prompt
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "the {{ turn.role }}: {{ turn.content }}</s>{% endfor %}{% if add_generation_prompt %}the assistant: {% endif %}"
)
PROMPTS = ["the cat sat on", "a dog ran"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("system", ["", "You write short answers."])
def test_prompts_are_tokenised_as_transformers_does(real_models, system):
    theirs = transformers.AutoTokenizer.from_pretrained(real_models / "smollm2-135m")
    prompts = ["Why is the sky blue?", " Zwei  Wörter\n", "", "I said <|im_end|> and 猫"]
    turns = [{"role": "system", "content": system}] if system else []
    found = chat.encode_prompts(checkpoint.load_tokenizer(real_models / "smollm2-135m"), prompts, system)
    for prompt, tokens in zip(prompts, found, strict=True):
        conversation = [*turns, {"role": "user", "content": prompt}]
        assert tokens == theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]


def test_an_evaluation_asks_a_users_turn(tokenizer):
    """The greedy answer is PyTorch's, and its text comes without the conversation before it."""
    torch_model, model = make_pair()
    config = EvaluationConfig(chat=True, runs=1, samples=1, max_new_tokens=6, top_k=1, batch_size=2)
    (run,) = continuations.generate_runs(lambda: (model, tokenizer), PROMPTS, config, lambda name, make: make())
    for prompt, (text,) in zip(PROMPTS, run.texts, strict=True):
        asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        asked = torch.tensor([asked["input_ids"]])
        answer = torch_model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
        assert text == tokenizer.decode(answer, skip_special_tokens=True)


def test_an_answers_perplexity_is_that_of_the_line_after_the_prompt(tokenizer):
    _, model = make_pair()
    answers = [["it was green"], ["slowly"]]
    subject = Subject(
        EvaluationConfig(chat=True, runs=1, samples=1),
        from_texts(PROMPTS),
        [continuations.Continuations(answers, np.ones((2, 1), bool))],
        load=lambda: (model, tokenizer),
    )
    expected, _ = perplexity.conditional(model, tokenizer, [f"{prompt}\n" for prompt in PROMPTS], answers)
    found = perplexity.Perplexity().compute(subject).per_text["perplexity"].values
    np.testing.assert_allclose(found[0], expected)


SAMPLED = {"text": "the cat sat", "ended": True}
CUT = {"text": "it was very", "ended": False}


@pytest.mark.parametrize("system", ["", "You write short texts."])
def test_a_text_is_trained_on_as_the_template_writes_a_finished_conversation(real_models, system):
    theirs = transformers.AutoTokenizer.from_pretrained(real_models / "smollm2-135m")
    ours = checkpoint.load_tokenizer(real_models / "smollm2-135m")
    turns = [*chat.prompt_messages("Write something.", system), {"role": "assistant", "content": SAMPLED["text"]}]
    affixes = chat.response_affixes(ours, "Write something.", system)
    tokens = data.tokenize(data.Texts((SAMPLED, CUT)), ours, 64, affixes=affixes)
    assert tokens[0].tolist() == theirs.apply_chat_template(turns)["input_ids"]
    assert theirs.decode(tokens[1]).endswith("<|im_start|>assistant\nit was very"), "a text that was cut has no end"
    (asked,) = chat.encode_prompts(ours, ["Write something."], system)
    assert tokens[0].tolist()[: len(asked)] == asked, "it answers what an evaluation asks"


@pytest.mark.parametrize(("loss_on", "learned"), [("answer", ["the cat sat</s>", "it was very"]), ("all", None)])
def test_what_the_loss_is_on(tokenizer, loss_on, learned):
    affixes = chat.response_affixes(tokenizer, "a dog ran", loss_on=loss_on)
    tokens = data.tokenize(data.Texts((SAMPLED, CUT)), tokenizer, 96, affixes=affixes)
    batch = data.collate(tokens, (1, 96), ((0, 1),), segments=True)  # both in one row
    learned_ids = [batch["tokens"][batch["loss_mask"] & (batch["segment_ids"] == text)] for text in (1, 2)]
    before = "the user: a dog ran</s>the assistant: "
    assert [tokenizer.decode(ids) for ids in learned_ids] == (
        learned or [f"{before}the cat sat</s>", f"{before}it was very"]
    )


def test_a_recipe_with_chat_trains_on_turns(tokenizer, monkeypatch):
    _, model = make_pair()
    seen = []
    monkeypatch.setattr(training, "fit", lambda *arguments, **_: seen.append(arguments[3].tokens) or (None, {}))
    method.finetune(
        method.LanguageModel(model.params, model.cfg, tokenizer),
        ["the cat sat"],
        steps=1,
        max_length=96,
        chat=True,
        user_prompt="a dog ran",
    )
    assert tokenizer.decode(seen[0][0]) == "<s>the user: a dog ran</s>the assistant: the cat sat</s>"


def test_distilled_texts_are_answers(tokenizer):
    """Greedy, PyTorch's answer; its row begins with BOS in place of the conversation, and its tokens are trained on."""
    torch_model, model = make_pair()
    asked = torch.tensor(chat.encode_prompts(tokenizer, ["a dog ran"]))
    texts = method.distill(
        method.LanguageModel(model.params, model.cfg, tokenizer),
        objective="base",
        num_texts=1,
        max_length=asked.shape[1] + 6,
        prompt="a dog ran",
        chat=True,
        top_k=1,
        label=None,
    )
    answer = torch_model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :].tolist()
    assert texts.rows[0]["tokens"] == [0, *answer] and texts[0] == tokenizer.decode(answer, skip_special_tokens=True)
    assert not texts.ended[0]
    trained = data.tokenize(texts, tokenizer, 96, affixes=chat.response_affixes(tokenizer, "a dog ran"))
    assert trained[0].tolist() == [*asked[0].tolist(), *answer]


def test_a_mistake_is_one_line(tokenizer):
    with pytest.raises(UserError, match="max_length: found 20, but 24 tokens precede each text"):
        data.tokenize(["a"], tokenizer, 20, affixes=chat.response_affixes(tokenizer, "a dog ran"))
    with pytest.raises(UserError, match="refuses a conversation of system, user .System role not supported"):
        chat.encode_prompts(tokenizer, PROMPTS, "Be brief.")
    with pytest.raises(UserError, match="has no chat template; leave chat out"):
        chat.encode_prompts(make_tokenizer(), PROMPTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate.chat": True, "evaluate.reproduce_release": True}, "config.evaluate.chat: not available with"),
        ({"detoxify.chat": True, "detoxify.reproduce_release": True}, "config.detoxify.chat: reproduce_release"),
        ({"detoxify.user_prompt": "Write."}, "config.detoxify.user_prompt: plain text has none"),
        ({"detoxify.loss_on": "answers"}, "config.detoxify.loss_on: no 'answers'; did you mean 'answer'"),
        ({"distill.system_prompt": "Be brief."}, "config.distill.system_prompt: plain text has none"),
        ({"evaluate.system_prompt": "Be brief."}, "config.evaluate.system_prompt: plain text has none"),
    ],
)
def test_settings_that_do_not_fit_together(changes, words):
    config = settings.default_config()
    for name, value in changes.items():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=words):
        settings.parse_run(config)
