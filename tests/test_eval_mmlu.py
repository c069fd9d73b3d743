"""MMLU in both forms against PyTorch loops written from the definition, one choice at a time."""

import numpy as np
import pytest
import torch

from tests.eval_helpers import WORDS, make_pair, make_tokenizer, torch_logprobs
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import mmlu

LIMIT = 640


def make_questions(rng, subject, count):
    def some(least, most):
        return " ".join(rng.choice(WORDS, rng.integers(least, most)))

    return [
        {
            "question": f" {some(3, 9)}?",
            "choices": (some(1, 3), some(1, 5), some(1, 5), "it" if i % 2 else some(2, 4)),
            "answer": int(rng.integers(4)),
            "subject": subject,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(4)
    shots = make_questions(rng, "small_birds", 3) + make_questions(rng, "trees", 2) + make_questions(rng, "hills", 1)
    asked = make_questions(rng, "small_birds", 5) + make_questions(rng, "trees", 4) + make_questions(rng, "hills", 3)
    return (*make_pair(seed=5, context=LIMIT), make_tokenizer(), asked, shots)


@torch.no_grad()
def reference(torch_model, tokenizer, asked, shots, form, k):
    """Whether each answer is correct, by subject; chosen by log-probability of the whole text (paper) or the letter."""
    right = {}
    for question in asked:
        examples = [shot for shot in shots if shot["subject"] == question["subject"]][:k]
        if len(examples) < k:
            continue
        values = []
        for i in range(4):
            if form == "paper":
                text = "".join(f"Question: {e['question']}\nAnswer: {e['choices'][e['answer']]}\n\n" for e in examples)
                tokens = tokenizer.encode(f"{text}Question: {question['question']}\nAnswer: {question['choices'][i]}")
                loss = torch_model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
                values.append(-float(loss.double()) * (len(tokens) - 1))
            else:
                name = question["subject"].replace("_", " ")
                text = f"The following are multiple choice questions (with answers) about {name}.\n\n"
                for e in examples:
                    lines = "\n".join(f"{'ABCD'[j]}. {e['choices'][j]}" for j in range(4))
                    text += f"{e['question'].strip()}\n{lines}\nAnswer: {'ABCD'[e['answer']]}\n\n"
                lines = "\n".join(f"{'ABCD'[j]}. {question['choices'][j]}" for j in range(4))
                context = tokenizer.encode(f"{text}{question['question'].strip()}\n{lines}\nAnswer:")
                tokens = tokenizer.encode(f"{text}{question['question'].strip()}\n{lines}\nAnswer: {'ABCD'[i]}")
                scored = torch_logprobs(torch_model, tokens)[len(context) - 1 :]
                values.append(sum(float(row[t]) for row, t in zip(scored, tokens[len(context) :], strict=True)))
        right.setdefault(question["subject"], []).append(int(np.argmax(values)) == question["answer"])
    return right


@pytest.mark.parametrize(
    ("form", "k", "skipped"), [("paper", 1, []), ("paper", 3, ["hills", "trees"]), ("standard", 2, ["hills"])]
)
def test_equals_a_torch_loop(world, form, k, skipped):
    torch_model, model, tokenizer, asked, shots = world
    found = mmlu.evaluate(model, tokenizer, asked, shots, form, k, batch_size=16)
    right = reference(torch_model, tokenizer, asked, shots, form, k)
    every = sum(right.values(), [])
    assert found["correct"] == sum(every) and found["questions"] == len(every)
    assert found["accuracy"] == pytest.approx(np.mean(every))
    assert found["subject_mean"] == pytest.approx(np.mean([np.mean(answers) for answers in right.values()]))
    assert found["subjects"] == {
        name: {"accuracy": pytest.approx(np.mean(answers)), "questions": len(answers)}
        for name, answers in right.items()
    }
    assert found["skipped"] == skipped and found["truncated"] == 0


def test_truncated_texts_are_counted(world):
    _, _, tokenizer, asked, shots = world
    found = mmlu.evaluate(make_pair(seed=5, context=24)[1], tokenizer, asked, shots, "paper", 1)
    assert 0 < found["truncated"] <= 4 * found["questions"]


def test_mistakes(world):
    _, model, tokenizer, asked, shots = world
    with pytest.raises(UserError, match="no form 'papr'; did you mean 'paper'"):
        mmlu.evaluate(model, tokenizer, asked, shots, "papr", 1)
    with pytest.raises(UserError, match="none of 12 questions has 4 examples"):
        mmlu.evaluate(model, tokenizer, asked, shots, "paper", 4)
