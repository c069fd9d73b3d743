"""lm-evaluation-harness for our models: an implementation of its `TemplateLM`, batched on the device.

    from unidetox_jax.evaluation import harness
    harness.evaluate(model, tokenizer, ["hellaswag", "my_task.yaml"])      # or, for other features of lm_eval:
    lm_eval.simple_evaluate(model=harness.HarnessLM(model, tokenizer), …)

The harness is an extra (`pip install unidetox-jax[harness]`). A stop string within a single token ends a row on the
device; if it spans several tokens, the row runs on and the text is cut afterwards.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from unidetox_jax.data.chat import render
from unidetox_jax.data.tokens import decode, encode, vocabulary_size
from unidetox_jax.decoding import warpers
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import continuations
from unidetox_jax.evaluation.generator import Generator
from unidetox_jax.evaluation.likelihood import loglikelihood
from unidetox_jax.models import Model

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"the harness needs lm_eval ({error}): pip install 'unidetox-jax[harness]'") from None

BOOTSTRAP = 100  # resamples for standard errors without a closed form
MAX_NEW_TOKENS = 256  # unless the task sets it
SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Settings of other back ends, at the values that have no effect; nor have None and False
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "best_of"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("diversity_penalty", "presence_penalty", "frequency_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_tokens"), 0),
}
IGNORED = ("do_sample", "use_cache", "length_penalty", "early_stopping")  # implied by temperature, or only for beams


class HarnessLM(TemplateLM):
    """One of our models as an lm_eval model. Every process of a multi-host run makes the same requests."""

    def __init__(self, model: Model | Generator, tokenizer: Any, batch_size: int = 256, seed: int = 0):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        self.max_length = model.cfg.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that predicts the first one of a text without context: BOS, or else the end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokens of a text, started as the tokenizer starts a text unless it already has BOS."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return encode(self.tokenizer, [string], begin=add_special_tokens)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the tokenizer's chat template."""
        return render(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        likelihoods = loglikelihood(
            self.model,
            # lm_eval moves spaces from the context to the continuation, which may leave the context empty
            [context or [self.prefix_token_id] for _, context, _ in requests],
            [continuation for _, _, continuation in requests],
            self.batch_size,
            label=None if disable_tqdm else "likelihoods",
        )
        pairs = zip(likelihoods.sums, likelihoods.greedy, strict=True)
        answers = [(float(total), bool(greedy)) for total, greedy in pairs]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in disjoint windows."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string; requests with equal settings are batched."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            contexts, settings = [requests[i].args[0] for i in members], requests[members[0]].args[1]
            for index, text in zip(members, self._generate(contexts, settings, disable_tqdm), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], gen_kwargs: Mapping[str, Any], quiet: bool) -> list[str]:
        settings = normalize_gen_kwargs({k: v for k, v in gen_kwargs.items() if v is not None}, MAX_NEW_TOKENS)
        count = settings.pop("max_gen_toks")
        end = self.tokenizer.decode([self.eot_token_id])
        stops = handle_stop_sequences(settings.pop("until", None), eos=end)
        room = self.max_length - count
        if room < 1:
            raise UserError(f"harness: a task asks for {count} new tokens, the model reads {self.max_length}")
        new, _ = continuations.complete(
            self.model,
            [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts],
            samples=1,
            max_new_tokens=count,
            warpers=_warpers(settings),
            seed=self.seed,
            batch_size=self.batch_size,
            eos_id=self._eos_ids(tuple(stops)),
            vocab_size=vocabulary_size(self.tokenizer),
            label=None if quiet else "generation",
        )
        texts = decode(self.tokenizer, [tokens for (tokens,) in new])
        return [postprocess_generated_text(text, stops, None) for text in texts]

    @functools.cache  # noqa: B019 (one entry per stop list of a task)
    def _eos_ids(self, stops: tuple[str, ...]) -> tuple[int, ...]:
        """The model's end tokens, and every token whose text contains a stop string."""
        eos_ids = {token for token in (*self.model.cfg.eos_token_ids, self.eot_token_id) if token is not None}
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        eos_ids |= {token for token, text in enumerate(texts) if any(stop and stop in text for stop in stops)}
        return tuple(sorted(eos_ids))


def evaluate(
    model: Model | Generator,
    tokenizer: Any,
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Runs tasks of lm-evaluation-harness.

    Args:
      tasks: names of lm_eval's tasks and groups, or `.yaml` task files.
      shots: few-shot examples; None: the task's default. limit: documents per task; None: all.

    Returns:
      task → metric → value: `acc`, `acc_stderr`, with the filter's name if there is one (`exact_match,strict`), and
      "documents".

    Raises:
      UserError: no such task, or it cannot be loaded.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # forking a process that owns devices may hang
    local = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for task in local:
        if not epath.Path(task).exists():
            raise UserError(f"harness: no file {task}")
    manager = TaskManager(include_defaults=len(local) < len(tasks))
    for task in tasks:
        if task not in local and task not in manager.all_tasks:
            raise UserError(f"harness: lm_eval has no task {task!r}; `lm-eval ls tasks` lists them")
    try:
        manager.load(list(tasks))
    except Exception as error:  # from lm_eval, `datasets` or the network
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"harness: {', '.join(tasks)} cannot be loaded ({reason})") from None
    results = simple_evaluate(
        model=HarnessLM(model, tokenizer, batch_size),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
        task_manager=manager,
    )
    counts = results.get("n-samples", {})
    return {
        name: {**_numbers(values), **({"documents": counts[name]["effective"]} if name in counts else {})}
        for name, values in results["results"].items()
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name != "sample_len"  # a count of documents
    }


def _warpers(settings: Mapping[str, Any]) -> tuple[warpers.Warper, ...]:
    """The warpers for a task's `temperature`, `top_k`, `top_p` and `min_p`; missing ones are off."""
    for name in sorted(set(settings) - {*SAMPLING, *IGNORED}):
        if settings[name] is not False and settings[name] != NEUTRAL.get(name):
            raise UserError(
                f"harness: a task asks for generation with {name}={settings[name]!r}, which is not implemented"
            )
    values = {name: settings.get(name, default) for name, default in SAMPLING.items()}
    if values["temperature"] == 0:
        return (warpers.greedy(),)
    return warpers.choose(**{**values, "top_k": max(values["top_k"], 0)})  # some back ends write -1 for off
