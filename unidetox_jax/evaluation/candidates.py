"""What may be evaluated beside a model alone: models under an objective, each of which may read something first."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A form of a target, beside the target as it is published: how its text comes about.

    In a model's path `{target}` stands for the target and `{name}` for its name, beside `{workdir}` and `{data_dir}`.
    """

    models: tuple[str, ...] = ("{target}",)  # in the order of the objective's arguments
    objective: str = "base"  # a name of decoding.objectives or package.module:function(setting=…)
    prefixes: tuple[str, ...] = ()  # what each model reads before a prompt; empty: nothing
    targets: tuple[str, ...] = ()  # whose form it is; empty: of all of config.targets
