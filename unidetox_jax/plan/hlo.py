"""Collectives read from the text of a compiled program: their kinds, their sizes, and how often each runs."""

import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
_COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?(\S+) = (\(?[a-z0-9]+\[.*?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)",
    re.MULTILINE,
)
_CALL = re.compile(
    r"(body|condition|calls|to_apply|called_computations|branch_computations)=(%[\w.\-]+|\{[%\w.\-, ]+\})"
)
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """One kind of collective at one depth of loops: how many, bytes that each device receives, the largest result."""

    kind: str
    depth: int
    count: int
    bytes: int
    largest: str


def collectives(hlo: str) -> tuple[Collectives, ...]:
    """The collectives of a compiled program's text, by depth of loops: 0 once a call, 1 in every round of a loop, 2 in
    a loop within (a decoding step's scan over layers)."""
    computations = dict(_COMPUTATION.findall(hlo))
    entry = _ENTRY.findall(hlo)[0]
    placed: dict[str, tuple[int, str]] = {}  # computation → its depth, and the loop's body (or entry) it is part of

    def place(name: str, depth: int, loop: str) -> None:
        if depth > placed.get(name, (-1, ""))[0]:
            placed[name] = depth, loop
            for how, callees in _CALL.findall(computations.get(name, "")):
                is_loop = how in ("body", "condition")
                for callee in re.findall(r"[\w.\-]+", callees):
                    place(callee, depth + is_loop, callee if is_loop else loop)

    place(entry, 0, entry)
    sizes: dict[tuple[int, str], list[tuple[int, str]]] = {}
    seen = set()
    for computation, body in computations.items():
        depth, loop = placed.get(computation, (0, entry))
        for name, shape, kind, operands in _COLLECTIVE.findall(body):
            # A TPU's asynchronous collective stands in several fusions of a loop, under one channel: it runs once.
            channel = re.search(r"channel_id=\d+", operands)
            key = loop, channel[0] if channel else name
            if key not in seen:
                sizes.setdefault((depth, kind), []).append(_size(shape))
            seen.add(key)
    return tuple(
        Collectives(kind, depth, len(members), sum(size for size, _ in members), max(members)[1])
        for (depth, kind), members in sorted(sizes.items())
    )


def _size(shape: str) -> tuple[int, str]:
    """(bytes, text) of the largest array of a result's shape: an asynchronous one is a tuple of input and output."""

    def size(dtype: str, dims: str) -> int:
        bits = re.search(r"\d+", dtype)  # 32 of f32, 8 of f8e4m3fn; pred has 8
        return math.prod(map(int, filter(None, dims.split(",")))) * int(bits[0] if bits else 8) // 8

    return max((size(*array), "{}[{}]".format(*array)) for array in _ARRAY.findall(shape))
