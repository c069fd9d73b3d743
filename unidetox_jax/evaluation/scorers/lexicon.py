"""The lexicon of the built-in world, whose grammar knows which sentence is toxic."""

from etils import epath

from unidetox_jax.data import toyworld

ARGUMENT = None


def make(argument: str):
    return toyworld.score


def files(argument: str) -> list[epath.Path]:
    return [epath.Path(toyworld.__file__)]
