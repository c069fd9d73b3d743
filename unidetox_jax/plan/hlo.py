"""What is read from the text of a compiled program: collectives, kernels and sorts, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?(\S+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)", re.MULTILINE)
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?")
_CALL = re.compile(
    r"(body|condition|calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
    r"(%[\w.\-]+|\{[%\w.\-, ]+\})"
)
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)")
# Instructions of which a GPU launches nothing
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id".split()
)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """One kind of collective among one group of devices at one depth of loops: how many, bytes that each device
    receives, the largest result. group: the places in the mesh of the devices of the first of the groups that exchange;
    empty: all."""

    kind: str
    depth: int
    count: int
    bytes: int
    largest: str
    group: tuple[int, ...] = ()


class Instruction(NamedTuple):
    """A line of a computation: its name, the text of its shape, what it does, operands and attributes."""

    name: str
    shape: str
    kind: str
    rest: str

    @property
    def callees(self) -> list[tuple[str, str]]:
        """(how, computation) of all that it calls."""
        return [(how, name) for how, names in _CALL.findall(self.rest) for name in re.findall(r"[\w.\-]+", names)]


class Text(NamedTuple):
    """A compiled program: its instructions by computation, and the one that it begins with."""

    computations: Mapping[str, list[Instruction]]
    entry: str


@functools.lru_cache(maxsize=1)
def parse(text: str) -> Text:
    """The program of a text as XLA prints it."""
    found = {
        name: [Instruction(*one) for one in _INSTRUCTION.findall(body)] for name, body in _COMPUTATION.findall(text)
    }
    return Text(found, _ENTRY.findall(text)[0])


def collectives(text: str) -> tuple[Collectives, ...]:
    """The collectives, by depth of loops: 0 once a call, 1 in every round of a loop, 2 in a loop within (a decoding
    step's scan over layers)."""
    program, seen = parse(text), set()
    sizes: dict[tuple[int, str, tuple[int, ...]], list[tuple[int, str]]] = {}
    placed = _placed(program)
    for computation, body in program.computations.items():
        depth, loop = placed.get(computation, (0, program.entry))
        for one in body:
            if not (kind := _COLLECTIVE.fullmatch(one.kind)):
                continue
            # A TPU's asynchronous collective stands in several fusions of a loop, under one channel: it runs once.
            channel = re.search(r"channel_id=\d+", one.rest)
            key = loop, channel[0] if channel else one.name
            if key not in seen:
                sizes.setdefault((depth, kind[1], _group(one.rest)), []).append(_size(one.shape))
            seen.add(key)
    return tuple(
        Collectives(kind, depth, len(members), sum(size for size, _ in members), max(members)[1], group)
        for (depth, kind, group), members in sorted(sizes.items())
    )


def sorts(text: str) -> dict[tuple[int, str], int]:
    """(depth of loops, first operand such as "f32[128,50257]") → how many sorts there are of it, top-k included."""
    program = parse(text)
    placed = _placed(program)
    found = [
        (placed.get(computation, (0, ""))[0], "{}[{}]".format(*_ARRAY.findall(one.shape)[0]))
        for computation, body in program.computations.items()
        for one in body
        if one.kind in ("sort", "topk") or (one.kind == "custom-call" and re.search(r'target="[^"]*TopK', one.rest))
    ]
    return dict(sorted(Counter(found).items()))


def kernels(text: str) -> dict[int, int]:
    """Depth of loops → kernels, copies and library calls that a GPU launches there; of a conditional's branches the
    shorter one, as the longer ones here are for what rarely occurs (candidates that tie)."""
    program = parse(text)

    @functools.cache
    def count(name: str) -> Counter:
        total: Counter = Counter()
        for one in program.computations.get(name, ()):
            inner = [count(callee) for _, callee in one.callees] if one.kind in ("while", "conditional", "call") else []
            if one.kind == "conditional":
                shortest: Counter = min(inner, key=lambda branch: sum(branch.values()))
                total += shortest
            for part in inner if one.kind != "conditional" else ():
                total += Counter({depth + (one.kind == "while"): n for depth, n in part.items()})
            total[0] += one.kind not in _FREE and not one.kind.endswith(("-done", "-update"))
        return total

    return dict(sorted(count(program.entry).items()))


def _placed(program: Text) -> dict[str, tuple[int, str]]:
    """Computation → its depth of loops, and the loop's body (or the entry) that it is part of."""
    placed: dict[str, tuple[int, str]] = {}

    def place(name: str, depth: int, loop: str) -> None:
        if depth > placed.get(name, (-1, ""))[0]:
            placed[name] = depth, loop
            for one in program.computations.get(name, ()):
                for how, callee in one.callees:
                    is_loop = how in ("body", "condition")
                    place(callee, depth + is_loop, callee if is_loop else loop)

    place(program.entry, 0, program.entry)
    return placed


def _group(rest: str) -> tuple[int, ...]:
    """The first of a collective's replica groups: {{0,1},{2,3}}, or [groups,size]<=[shape]T(order)."""
    found = _GROUP.search(rest)
    if not found:
        return ()
    if found[1]:
        return tuple(map(int, found[1].split(",")))
    shape = [int(size) for size in found[4].split(",")]
    order = [int(axis) for axis in found[5].split(",")] if found[5] else list(range(len(shape)))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    ids = [0]
    for axis in order:
        ids = [at + step * strides[axis] for at in ids for step in range(shape[axis])]
    return tuple(ids[: int(found[3])])


def _size(shape: str) -> tuple[int, str]:
    """(bytes, text) of the largest array of a result's shape: an asynchronous one is a tuple of input and output."""

    def size(dtype: str, dims: str) -> int:
        bits = re.search(r"\d+", dtype)  # 32 of f32, 8 of f8e4m3fn; pred has 8
        return math.prod(map(int, filter(None, dims.split(",")))) * int(bits[0] if bits else 8) // 8

    return max((size(*array), "{}[{}]".format(*array)) for array in _ARRAY.findall(shape))
