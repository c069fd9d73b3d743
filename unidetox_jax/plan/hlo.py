"""Reads a compiled program's HLO text: its collectives, kernels and sorts, and their depth of loops."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?(\S+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)", re.MULTILINE)
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?")
_CALL = re.compile(
    r"(body|condition|calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
    r"(%[\w.\-]+|\{[%\w.\-, ]+\})"
)
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)")
# Instructions for which a GPU launches nothing
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id".split()
)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collectives of one kind, device group and place: their number, bytes that each device receives, the largest
    result.

    depth: of loops. times: how often the loops with known trip counts around them run them. in_steps: whether a loop
    without one is around them as well, which in these programs is the loop over decoding steps. group: indices in the
    mesh of the first of the groups that exchange; empty: all devices.
    """

    kind: str
    depth: int
    count: int
    bytes: int
    largest: str
    group: tuple[int, ...] = ()
    times: int = 1
    in_steps: bool = False


class Instruction(NamedTuple):
    """A line of a computation: name, shape as text, opcode, operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def callees(self) -> list[tuple[str, str]]:
        """(attribute, computation) of each call."""
        return [(how, name) for how, names in _CALL.findall(self.rest) for name in re.findall(r"[\w.\-]+", names)]


class Place(NamedTuple):
    """Where a computation is: depth of loops, the innermost loop's body (or the entry computation), and `times` and
    `in_steps` as in `Collectives`."""

    depth: int
    loop: str
    times: int = 1
    in_steps: bool = False


class Module(NamedTuple):
    """A compiled program: instructions by computation, and the name of the entry computation."""

    computations: Mapping[str, list[Instruction]]
    entry: str


@functools.lru_cache(maxsize=1)
def parse(text: str) -> Module:
    """Parses HLO text as XLA prints it."""
    computations = {
        name: [Instruction(*fields) for fields in _INSTRUCTION.findall(body)]
        for name, body in _COMPUTATION.findall(text)
    }
    return Module(computations, _ENTRY.findall(text)[0])


def collectives(text: str) -> tuple[Collectives, ...]:
    """The collectives by depth of loops: 0 outside of loops, 1 in a loop, 2 in a nested one (a decoding step's scan
    over layers)."""
    module, seen = parse(text), set()
    members: dict[tuple, list[tuple[int, str]]] = {}
    places = _places(module)
    for computation, body in module.computations.items():
        place = places.get(computation, Place(0, module.entry))
        for instruction in body:
            if not (kind := _COLLECTIVE.fullmatch(instruction.opcode)):
                continue
            # On TPUs an asynchronous collective appears in several fusions of a loop with one channel, but runs once
            channel = re.search(r"channel_id=\d+", instruction.rest)
            key = place.loop, channel[0] if channel else instruction.name
            if key not in seen:
                where = place.depth, kind[1], _group(instruction.rest), place.times, place.in_steps
                members.setdefault(where, []).append(_size(instruction.shape))
            seen.add(key)
    return tuple(
        Collectives(kind, depth, len(sizes), sum(size for size, _ in sizes), max(sizes)[1], group, times, in_steps)
        for (depth, kind, group, times, in_steps), sizes in sorted(members.items())
    )


def sorts(text: str) -> dict[tuple[int, str], int]:
    """(depth of loops, first operand such as "f32[128,50257]") → number of sorts of it, top-k included."""
    module = parse(text)
    places = _places(module)
    operands = [
        (places.get(computation, Place(0, module.entry)).depth, "{}[{}]".format(*_ARRAY.findall(instruction.shape)[0]))
        for computation, body in module.computations.items()
        for instruction in body
        if instruction.opcode in ("sort", "topk")
        or (instruction.opcode == "custom-call" and re.search(r'target="[^"]*TopK', instruction.rest))
    ]
    return dict(sorted(Counter(operands).items()))


def kernels(text: str) -> dict[int, int]:
    """Depth of loops → kernels, copies and library calls that a GPU launches there. Of a conditional's branches the
    shortest counts, as in these programs the longer ones handle rare cases (candidates that tie)."""
    module = parse(text)

    @functools.cache
    def count(name: str) -> Counter:
        total: Counter = Counter()
        for instruction in module.computations.get(name, ()):
            opcode, inner = instruction.opcode, []
            if opcode in ("while", "conditional", "call"):
                inner = [count(callee) for _, callee in instruction.callees]
            if opcode == "conditional":
                inner = [min(inner, key=lambda branch: sum(branch.values()))]
            for counts in inner:
                total += Counter({depth + (opcode == "while"): n for depth, n in counts.items()})
            total[0] += opcode not in _FREE and not opcode.endswith(("-done", "-update"))
        return total

    return dict(sorted(count(module.entry).items()))


def _places(module: Module) -> dict[str, Place]:
    """The place of each computation that the program calls; the deepest one if it calls it in several."""
    places: dict[str, Place] = {}

    def visit(name: str, place: Place) -> None:
        if name not in places or place.depth > places[name].depth:
            places[name] = place
            for instruction in module.computations.get(name, ()):
                count = _trip_count(instruction, module) if instruction.opcode == "while" else None
                for how, callee in instruction.callees:
                    if how in ("body", "condition"):
                        in_steps = place.in_steps or count is None
                        visit(callee, Place(place.depth + 1, callee, place.times * (count or 1), in_steps))
                    else:
                        visit(callee, place)

    visit(module.entry, Place(0, module.entry))
    return places


def _trip_count(loop: Instruction, module: Module) -> int | None:
    """How often a `while` runs its body: as the compiler for GPUs notes it, or by a condition "counter < constant", as
    that for TPUs leaves it; None if neither tells."""
    if known := _TRIP_COUNT.search(loop.rest):
        return int(known[1])
    condition = dict(loop.callees).get("condition", "")
    instructions = {instruction.name: instruction for instruction in module.computations.get(condition, ())}
    compared = [one for one in instructions.values() if one.opcode == "compare" and one.shape.startswith("pred[]")]
    if len(compared) != 1 or "direction=LT" not in compared[0].rest or list(instructions.values())[-1] != compared[0]:
        return None
    limit = instructions.get(re.findall(r"%[\w.\-]+", compared[0].rest)[1])
    return int(limit.rest.partition(")")[0]) if limit and limit.opcode == "constant" else None


def _group(rest: str) -> tuple[int, ...]:
    """The first of a collective's replica groups: {{0,1},{2,3}}, or [groups,size]<=[shape]T(order)."""
    match = _GROUP.search(rest)
    if not match:
        return ()
    if match[1]:
        return tuple(map(int, match[1].split(",")))
    shape = [int(size) for size in match[4].split(",")]
    order = [int(axis) for axis in match[5].split(",")] if match[5] else list(range(len(shape)))
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)
    return tuple(ids[: int(match[3])].tolist())


def _size(shape: str) -> tuple[int, str]:
    """(bytes, text) of the largest array in a result's shape; an asynchronous result is a tuple of input and output."""

    def size(dtype: str, dims: str) -> int:
        bits = re.search(r"\d+", dtype)  # 32 of f32, 8 of f8e4m3fn; pred has 8
        return math.prod(map(int, filter(None, dims.split(",")))) * int(bits[0] if bits else 8) // 8

    return max((size(*array), "{}[{}]".format(*array)) for array in _ARRAY.findall(shape))
