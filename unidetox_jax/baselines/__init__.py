"""Rival methods, by name: what the paper compares UniDetox with, and what is asked for beside it.

A baseline is a frozen dataclass whose fields are its settings, with the published ones as defaults. It says which
twins of a target it needs, how text comes about by it (`candidate`), and makes a model if it has one (`make`). Its
class goes into BASELINES below, or, for one of your own, into config.baselines.methods as "package.module:Class(…)".
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
    "preprompt": f"{HERE}.prompts:Preprompt",
    "dapt": f"{HERE}.dapt:Dapt",
    "detoxigen": f"{HERE}.detoxigen:DetoxiGen",
    "self_debiasing": f"{HERE}.prompts:SelfDebiasing",
    "npo": f"{HERE}.npo:Npo",
    "profs": f"{HERE}.profs:ProFS",
}
WHAT = "baseline"


def get(text: str) -> Baseline:
    """The baseline that "name" or "name(setting=literal, …)" means.

    Raises:
      UserError: an unknown name or setting (the known ones are listed), or a value that is not as it must be.
    """
    name, settings = extensions.parse(text, WHAT)
    if name not in BASELINES and ":" not in name:
        raise UserError(f"{WHAT}: unknown name {name!r}{suggest(name, BASELINES)}; your own: package.module:Class")
    kind = extensions.load(BASELINES.get(name, name), WHAT, "class", known=BASELINES)
    if not (isinstance(kind, type) and issubclass(kind, Baseline)):
        raise UserError(f"{WHAT} {name!r}: found {kind!r}, expected a subclass of {Baseline.__module__}.Baseline")
    known = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in known:
            hint = suggest(setting, known) if known else " (it has none)"
            raise UserError(f"{WHAT} {name}: no setting {setting!r}{hint}")
    try:
        return kind(**settings)
    except UserError as error:  # these lines begin with the setting's name
        raise UserError(f"{WHAT} {name}: {error}") from None
