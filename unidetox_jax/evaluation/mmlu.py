"""MMLU accuracy, in the paper's form and in the standard one.

    paper      Question: …\nAnswer: the answer's text     the first k dev examples as shots, validation split; chooses
                                                        the text with the highest total log-probability
    standard   the question with choices A to D           lm-evaluation-harness's prompt, test split; chooses a letter

A question yields four texts, each tokenised as a whole. Their common prefix is the context, and only the differing rest
is scored, since the prefix would add the same to all four.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax import data
from unidetox_jax.data.tokens import encode
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation.generator import Generator
from unidetox_jax.evaluation.likelihood import common_prefix_length, loglikelihood
from unidetox_jax.evaluation.metrics import Cell, Metric, Quantity, Result, Subject
from unidetox_jax.models import Model

LETTERS = "ABCD"
SPLITS = {"paper": "validation", "standard": "test"}

Question = Mapping[str, Any]  # question: str, choices: four str, answer: index, subject: str, as data's mmlu records


class Mmlu(Metric):
    """Accuracy on MMLU, once for each of config.evaluate.mmlu."""

    field = "mmlu"
    loads = "subject"

    def reads(self, settings: Any) -> dict[str, str]:
        for text in settings.mmlu:
            variant(text)
        return {"mmlu": "mmlu" if settings.mmlu else ""}

    def compute(self, subject: Subject) -> Result:
        def measure(text: str) -> dict[str, Any]:
            return subject.keep(f"mmlu.{text.replace(':', '-')}.json", functools.partial(_measure, subject, text))

        return Result({text: measure(text) for text in subject.settings.mmlu})

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        def title(form: str, shots: str, split: str = "") -> str:
            return f"MMLU {form} {shots}-shot" + (f", {split}" if split else "")

        return {
            Quantity(
                f"mmlu_{text}",
                title(*text.split(":", 2)),
                False,
                explanation="MMLU: accuracy on questions of knowledge.",
            ): Cell(
                result["accuracy"],
                low=result["accuracy"] - 1.96 * result["stderr"],
                high=result["accuracy"] + 1.96 * result["stderr"],
            )
            for text, result in summary.items()
        }


def variant(text: str) -> tuple[str, int, str]:
    """Parses `FORM:SHOTS[:SPLIT]` into form, shots and split. Raises UserError if it cannot."""
    form, _, rest = text.partition(":")
    shots, _, split = rest.partition(":")
    if form not in SPLITS or not shots.isdecimal():
        raise UserError(
            f"config.evaluate.mmlu: found {text!r}, expected FORM:SHOTS or FORM:SHOTS:SPLIT, "
            f"FORM one of {', '.join(SPLITS)}"
        )
    return form, int(shots), split or SPLITS[form]


def _measure(subject: Subject, text: str) -> dict[str, Any]:
    form, shots, split = variant(text)
    questions, examples = (data.load("mmlu", name, subject.data_dir) for name in (split, "dev"))
    size = subject.settings.score_batch_size
    result = evaluate(*subject.load(), questions, examples, form, shots, size, label=f"mmlu {text}")
    return {**result, "split": split}


def evaluate(
    model: Model | Generator,
    tokenizer: Any,
    questions: Sequence[Question],
    shots: Sequence[Question],
    form: str = "paper",
    k: int = 1,
    batch_size: int = 256,
    label: str | None = None,
) -> dict[str, Any]:
    """Accuracy over `questions`, each preceded by k examples of its subject.

    Log-probabilities are in float32: bfloat16 would tie long texts (spacing of about 2 nats at 150 tokens), and of ties
    the first choice wins.

    Args:
      shots: the dev split; subjects with fewer than k questions there are skipped, and listed in the result.

    Returns:
      {"accuracy" (over questions), "stderr", "subject_mean" (over subjects), "questions", "correct", "subjects": name
      → {"accuracy", "questions"}, "skipped": names, "truncated": texts that lost context on the left, "form", "k"}, and
      "undecided" if an objective excludes all four answers of some questions, for which the first is chosen.

    Raises:
      UserError: an unknown form, or no question with enough shots.
    """
    if form not in SPLITS:
        raise UserError(f"mmlu: no form {form!r}{suggest(form, SPLITS)}")
    examples = collections.defaultdict(list)
    for example in shots:
        examples[example["subject"]].append(example)
    asked = [question for question in questions if len(examples[question["subject"]]) >= k]
    subjects = [question["subject"] for question in asked]
    if not asked:
        raise UserError(f"mmlu: none of {len(questions)} questions has {k} examples of its subject in the dev split")
    contexts, continuations = [], []
    prefixes = {subject: prefix(shown[:k], subject, form) for subject, shown in examples.items()}
    texts = [text for question in asked for text in candidates(question, prefixes[question["subject"]], form)]
    tokens = encode(tokenizer, texts)
    for start in range(0, len(texts), len(LETTERS)):
        choices = tokens[start : start + len(LETTERS)]
        shared = common_prefix_length(*choices)
        contexts += [text[:shared] for text in choices]
        continuations += [text[shared:] for text in choices]
    likelihoods = loglikelihood(model, contexts, continuations, batch_size, label=label)
    sums = likelihoods.sums.reshape(-1, len(LETTERS))
    chosen, undecided = sums.argmax(axis=1), int(np.isneginf(sums).all(axis=1).sum())
    correct = chosen == np.array([question["answer"] for question in asked])
    return {
        **_accuracies(correct, subjects),
        "skipped": sorted({question["subject"] for question in questions} - set(subjects)),
        "truncated": int(np.count_nonzero(likelihoods.truncated)),
        "form": form,
        "k": k,
        **({"undecided": undecided} if undecided else {}),
    }


def prefix(examples: Sequence[Question], subject: str, form: str) -> str:
    """The text before a question: the examples with their answers."""
    if form == "paper":
        return "".join(f"{_stem(example, form)}{example['choices'][example['answer']]}\n\n" for example in examples)
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return head + "".join(f"{_stem(example, form)} {LETTERS[example['answer']]}\n\n" for example in examples)


def candidates(question: Question, prefix: str, form: str) -> list[str]:
    """The four texts of a question, including the examples before it."""
    stem = prefix + _stem(question, form)
    if form == "paper":
        return [stem + choice for choice in question["choices"]]
    return [f"{stem} {letter}" for letter in LETTERS]


def _stem(question: Question, form: str) -> str:
    if form == "paper":
        return f"Question: {question['question']}\nAnswer: "
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question["choices"], strict=True))
    return f"{question['question'].strip()}\n{listed}Answer:"


def _accuracies(correct: np.ndarray, subjects: Sequence[str]) -> dict[str, Any]:
    names = np.asarray(subjects, object)
    by_subject = {
        name: {"accuracy": float(correct[names == name].mean()), "questions": int((names == name).sum())}
        for name in sorted(set(subjects))
    }
    accuracy = float(correct.mean())
    return {
        "accuracy": accuracy,
        "stderr": float(np.sqrt(accuracy * (1 - accuracy) / len(correct))),
        "subject_mean": float(np.mean([subject["accuracy"] for subject in by_subject.values()])),
        "questions": len(correct),
        "correct": int(correct.sum()),
        "subjects": by_subject,
    }
