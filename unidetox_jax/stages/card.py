"""The distilled data set's card: content warning, use, how to reproduce it.

It holds no times and no paths, so that it is the same in every working directory.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from unidetox_jax.data.texts import Texts
from unidetox_jax.decoding import objectives
from unidetox_jax.stages.settings import DistillSettings, Run
from unidetox_jax.stages.task import versions

TEMPLATE = """\
# {name}: {count} texts from {kind}

**Content warning.** Language models wrote these texts, and nobody has read them. Some may be offensive, hateful or
untrue, and some may name real people. They are meant for fine-tuning models towards less toxic text (UniDetox, Lu et
al., ICLR 2025) and for research on it, and for nothing else.

`texts.csv` has one column, `Text`. `texts.jsonl` has a line for each text: its row and seed, which determine it, all
its tokens (those of the prompt first), whether it ended by itself, and the mean log-probability of its new tokens under
each model.

## How it was made

Tokens were drawn from the objective `{objective}`. {beginning}

{settings}

Models, in the order of the objective's arguments ({arguments}):

{sources}

Made on {made_on}. The same settings, models, mesh and versions make the same bytes.

{versions}

## What is in it

{figures}
"""


def render(
    run: Run, settings: DistillSettings, texts: Texts, figures: Mapping[str, Any], sources: Mapping[str, Any]
) -> str:
    """The card as Markdown. sources: {model's name: its source and fingerprint}."""
    objective = objectives.get(run.path(settings.objective))
    single = len(settings.models) == 1
    return TEMPLATE.format(
        name=run.shared.name,
        count=len(texts),
        kind="one model alone" if single else f"the contrast of {', '.join(settings.models)}",
        objective=objective,
        beginning=_beginning(settings),
        settings=_json({**dataclasses.asdict(settings), "dtype": run.shared.dtype}),
        arguments=", ".join(objective.arguments),
        sources=_json(sources),
        made_on="; ".join(texts.made_on),
        versions=_json(versions()),
        figures=_json(figures),
    )


def _beginning(settings: DistillSettings) -> str:
    if not settings.chat:
        return "Every text begins with BOS" + (f" and {settings.prompt!r}." if settings.prompt else ".")
    system = f" after the system prompt {settings.system_prompt!r}" if settings.system_prompt else ""
    return (
        f"Every text is the answer to {settings.prompt!r} in the model's chat template{system}; that is no part of it."
    )


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"
