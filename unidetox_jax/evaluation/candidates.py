"""A text generator to evaluate beside a plain model: models under an objective, each with an optional prefix."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Candidate:
    """How a variant of a target generates text.

    In model paths, `{target}` is replaced by the target and `{name}` by its name, beside `{workdir}` and `{data_dir}`.
    """

    models: tuple[str, ...] = ("{target}",)  # in the order of the objective's arguments
    objective: str = "base"  # a name in decoding.objectives, or package.module:function(setting=…)
    prefixes: tuple[str, ...] = ()  # text that each model reads before a prompt; empty: none
    targets: tuple[str, ...] = ()  # targets that it applies to; empty: all of config.targets
