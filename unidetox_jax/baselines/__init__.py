"""Registry of baseline methods: those that the paper compares UniDetox with, and others.

A baseline is a frozen dataclass whose fields are its settings, with published values as defaults. It declares the twins
of a target that it needs and how it generates text (`candidate`), and may make a model of its own (`make`). Its class
is registered in BASELINES below; one of your own goes into config.baselines.methods as "package.module:Class(…)".
"""

import dataclasses

from unidetox_jax import extensions
from unidetox_jax.baselines.base import Baseline
from unidetox_jax.errors import UserError, suggest

HERE = "unidetox_jax.baselines"
BASELINES = {
    "dexperts": f"{HERE}.dexperts:DExperts",
    "lm_steer": f"{HERE}.lm_steer:LMSteer",
    "task_arithmetic": f"{HERE}.task_arithmetic:TaskArithmetic",
    "preprompt": f"{HERE}.preprompt:Preprompt",
    "dapt": f"{HERE}.dapt:Dapt",
    "detoxigen": f"{HERE}.detoxigen:DetoxiGen",
    "self_debiasing": f"{HERE}.self_debiasing:SelfDebiasing",
    "npo": f"{HERE}.npo:Npo",
    "profs": f"{HERE}.profs:ProFS",
}


def get(text: str) -> Baseline:
    """The baseline given by "name" or "name(setting=literal, …)".

    Raises:
      UserError: an unknown name or setting (the message lists known ones), or an invalid value.
    """
    name, settings = extensions.parse(text, "baseline")
    if name not in BASELINES and ":" not in name:
        raise UserError(f"baseline: unknown name {name!r}{suggest(name, BASELINES)}; your own: package.module:Class")
    kind = extensions.load(BASELINES.get(name, name), "baseline", "class", known=BASELINES)
    if not (isinstance(kind, type) and issubclass(kind, Baseline)):
        raise UserError(f"baseline {name!r}: found {kind!r}, expected a subclass of {Baseline.__module__}.Baseline")
    known = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in known:
            hint = suggest(setting, known) if known else " (it has none)"
            raise UserError(f"baseline {name}: no setting {setting!r}{hint}")
    try:
        return kind(**settings)
    except UserError as error:  # begins with the setting's name
        raise UserError(f"baseline {name}: {error}") from None
