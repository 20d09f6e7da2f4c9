"""Reads what a compiler made: the text of an optimized HLO module, which CPUs, GPUs and TPUs have in common."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_HEADER = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_ARRAY = re.compile(r"(?P<kind>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](?:\{(?P<order>[\d,]*)(?P<rest>[^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions without work of their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
_MOVES = {"copy", "transpose"}
_CONVERTS = {"convert"}
# What a fusion may have besides, and still only moves or converts.
_TRIVIAL = {"parameter", "bitcast", "reshape", "slice", "broadcast", "constant", "tuple", "get-tuple-element"}


@dataclass(frozen=True)
class Array:
    """One array.

    Attributes:
      kind: its dtype.
      sizes: its shape.
      order: its axes from the fastest to the slowest, as they lie in memory.
      space: 0 for the device's main memory.
    """

    kind: str
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Its bytes, without padding."""
        return math.ceil(math.prod(self.sizes) * _bits(self.kind) / 8)

    @property
    def bytes_in_memory(self) -> int:
        """Its bytes, if they are in the main memory."""
        return self.bytes if self.space == 0 else 0


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name.
      opcode: what it does.
      results: its result, or the parts of it.
      operands: the names of its operands.
      arguments: what stands in its brackets: the operands, or a number.
      attributes: everything behind them.
      called: the computations that it runs, by the attribute that names them.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    called: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: instructions by computation and name.
      entry: the computation that runs first.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


@dataclass(frozen=True)
class Traffic:
    """A kind of collective.

    Attributes:
      count: how often it runs.
      bytes: what each device sends.
    """

    count: int
    bytes: int


@dataclass(frozen=True)
class Census:
    """What is in a program.

    Attributes:
      bytes_moved: bytes that pass between a device and its main memory in one run.
      collectives: the traffic between devices, by kind.
      convolutions: their number.
      convolutions_not_nhwc: those that read or write features which are not next to each other in memory.
      moves: instructions that only copy or transpose.
      bytes_of_moves: what these read and write.
      converts: instructions that only change the dtype.
      bytes_of_converts: what these read and write.
      kernels: calls of kernels that the compiler did not make, by their name.
    """

    bytes_moved: int
    collectives: Mapping[str, Traffic]
    convolutions: int
    convolutions_not_nhwc: int
    moves: int
    bytes_of_moves: int
    converts: int
    bytes_of_converts: int
    kernels: Mapping[str, int]


def parse(text: str) -> Module:
    """Reads the text of a module.

    Raises:
      ValueError: if it has no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if (header := _HEADER.match(line)) and "->" in line:
                current = computations.setdefault(header["name"], {})
                entry = header["name"] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif (start := _INSTRUCTION.match(line)) is not None:
            current[start["name"]] = _instruction(start["name"], line[start.end() :])
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no entry.")
    return Module(computations, entry)


def census(module: Module, devices: int) -> Census:
    """Counts what is in a program.

    Args:
      module: the program.
      devices: the number of devices that run it.
    """
    runs = list(_runs(module))
    convolutions = [(computation, each) for computation, each, _ in _everywhere(module, runs) if _is_convolution(each)]
    moves = [each for each in runs if _only(module, each[1], _MOVES)]
    converts = [each for each in runs if _only(module, each[1], _CONVERTS)]
    kernels = Counter(_kernel(each) for _, each, _ in _everywhere(module, runs) if each.opcode == "custom-call")

    def bytes_of(some: list[tuple[str, Instruction, int]]) -> int:
        return sum(times * _bytes(module, computation, each) for computation, each, times in some)

    return Census(
        bytes_moved=bytes_of(runs),
        collectives=_collectives(module, runs, devices),
        convolutions=len(convolutions),
        convolutions_not_nhwc=sum(not _is_nhwc(module, *each) for each in convolutions),
        moves=len(moves),
        bytes_of_moves=bytes_of(moves),
        converts=len(converts),
        bytes_of_converts=bytes_of(converts),
        kernels={name: count for name, count in kernels.items() if name},
    )


# ---- Text


def _instruction(name: str, text: str) -> Instruction:
    type_end = _matching(text, 0) if text.startswith("(") else text.index(" ")
    opcode_end = text.index("(", type_end)
    operands_end = _matching(text, opcode_end)
    attributes = text[operands_end:]
    return Instruction(
        name,
        text[type_end:opcode_end].strip(),
        tuple(_arrays(text[:type_end])),
        tuple(_NAME.findall(text[opcode_end:operands_end])),
        text[opcode_end + 1 : operands_end - 1],
        attributes,
        {kind: tuple(_NAME.findall(names)) for kind, names in _CALLED.findall(attributes)},
    )


def _matching(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return len(text)


def _arrays(text: str) -> Iterator[Array]:
    for found in _ARRAY.finditer(text):
        sizes = tuple(int(size.removeprefix("<=")) for size in found["sizes"].split(",") if size)
        order = tuple(int(axis) for axis in (found["order"] or "").split(",") if axis)
        space = re.search(r"S\((\d+)\)", found["rest"] or "")
        yield Array(found["kind"], sizes, order or tuple(reversed(range(len(sizes)))), int(space[1]) if space else 0)


@functools.cache
def _bits(kind: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    return 8 if kind == "pred" else int(digits[1]) if digits else 0


# ---- What runs, and how often


def _runs(module: Module) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that runs on its own, not in a fusion: its computation, itself, and how often."""

    def visit(computation: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for each in module.computations.get(computation, {}).values():
            if each.opcode not in _FREE:
                yield computation, each, times
            if each.opcode == "while":
                trips = _trips(module, each)
                for body in each.called.get("body", ()):
                    yield from visit(body, times * trips)
            elif each.opcode in ("call", "conditional", "async-start"):
                for names in each.called.values():
                    for name in names:
                        yield from visit(name, times)

    return visit(module.entry, 1)


def _everywhere(module: Module, runs: list[tuple[str, Instruction, int]]) -> Iterator[tuple[str, Instruction, int]]:
    """The same with the instructions in fusions."""
    for computation, each, times in runs:
        yield computation, each, times
        if each.opcode == "fusion":
            for name in each.called.get("calls", ()):
                inner = [(name, instruction, times) for instruction in module.computations.get(name, {}).values()]
                yield from _everywhere(module, inner)


def _trips(module: Module, loop: Instruction) -> int:
    """How often a loop runs: as the compiler notes it, or the largest number that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    numbers = [1]
    waiting = list(loop.called.get("condition", ()))
    while waiting:
        for each in module.computations.get(waiting.pop(), {}).values():
            if each.opcode == "constant" and each.arguments.isdigit():
                numbers.append(int(each.arguments))
            waiting += [name for names in each.called.values() for name in names]
    return max(numbers)


# ---- Bytes


def _bytes(module: Module, computation: str, instruction: Instruction) -> int:
    """What an instruction reads from the main memory and writes to it."""
    inside = module.computations[computation]
    results = instruction.results
    match instruction.opcode:
        case opcode if opcode.endswith("-done"):
            return 0
        case "dynamic-slice" | "gather":
            return 2 * sum(array.bytes_in_memory for array in results)
        case "dynamic-update-slice":
            return 2 * _memory_of(inside, instruction.operands[1])
        case "copy-start":
            return results[0].bytes_in_memory + _memory_of(inside, instruction.operands[0])
        case "slice-start":
            is_read = _memory_of(inside, instruction.operands[0]) > 0
            return results[1].bytes_in_memory + (results[1].bytes if is_read else 0)
        case opcode if opcode.endswith("-start"):
            results = results[-1:]
    written = sum(array.bytes_in_memory for array in results)
    if instruction.opcode != "fusion":
        return written + sum(_memory_of(inside, name) for name in dict.fromkeys(instruction.operands))
    (fused,) = instruction.called["calls"]
    uses = _uses_of_parameters(module.computations[fused])
    read = 0
    for number, name in enumerate(instruction.operands):
        whole = _memory_of(inside, name)
        kinds = uses.get(number, [])
        if kinds and all(each.opcode == "dynamic-slice" for each in kinds):
            whole = min(whole, sum(array.bytes for each in kinds for array in each.results))
        elif kinds and all(each.opcode == "dynamic-update-slice" for each in kinds):
            # Overwritten in place: of result and operand only the new part counts.
            new = sum(_memory_of(module.computations[fused], each.operands[1], anywhere=True) for each in kinds)
            written, whole = written - whole + min(whole, new), 0
        read += whole
    return max(written, 0) + read


def _uses_of_parameters(fused: Mapping[str, Instruction]) -> dict[int, list[Instruction]]:
    """The instructions that use each parameter of a fusion as their first operand; others are in the list too."""
    numbers = {each.name: int(each.arguments) for each in fused.values() if each.opcode == "parameter"}
    aliases = dict(numbers)
    for each in fused.values():  # defined before they are used
        if each.opcode == "bitcast" and each.operands and each.operands[0] in aliases:
            aliases[each.name] = aliases[each.operands[0]]
    uses: dict[int, list[Instruction]] = {}
    for each in fused.values():
        for name in each.operands:
            if name in aliases and each.opcode != "bitcast":
                uses.setdefault(aliases[name], []).append(each)
    return uses


def _memory_of(inside: Mapping[str, Instruction], name: str, *, anywhere: bool = False) -> int:
    instruction = inside.get(name)
    if instruction is None:
        return 0
    return sum(array.bytes if anywhere else array.bytes_in_memory for array in instruction.results)


# ---- Kinds of instructions


def _only(module: Module, instruction: Instruction, kinds: set[str]) -> bool:
    """Whether an instruction does one of these things, and nothing but what is free besides."""
    if instruction.opcode in kinds:
        return True
    if instruction.opcode != "fusion":
        return False
    inside = {each.opcode for name in instruction.called["calls"] for each in module.computations[name].values()}
    return bool(inside & kinds) and inside <= kinds | _TRIVIAL


def _is_convolution(instruction: Instruction) -> bool:
    """A convolution over more than one element; TPUs compute products as convolutions over one."""
    if instruction.opcode == "custom-call" and "__cudnn$conv" in instruction.attributes:
        return True
    size = re.search(r"window=\{size=([\dx]+)", instruction.attributes)
    return instruction.opcode == "convolution" and bool(size) and any(int(n) > 1 for n in size[1].split("x"))


def _is_nhwc(module: Module, computation: str, instruction: Instruction) -> bool:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return True
    first = module.computations[computation].get(instruction.operands[0])
    read = first.results[0] if first is not None and first.results else None
    arrays = ((read, labels[1]), (instruction.results[0], labels[3]))
    # Gradients of kernels swap batch and features: then the batch is what is next to each other.
    return all(array is None or labels_[array.order[0]] in "fb" for array, labels_ in arrays)


def _kernel(instruction: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    name = target[1] if target else ""
    if name == "tpu_custom_call":
        where = re.search(r'op_name="([^"]+)"', instruction.attributes)
        return (where[1].rpartition("/")[2] if where else "") or "Pallas"
    return name if name.startswith("__cudnn$fmha") else ""


# ---- Between devices


def _collectives(module: Module, runs: list[tuple[str, Instruction, int]], devices: int) -> dict[str, Traffic]:
    """A collective that runs in the background is in several computations; its channel tells that it is one."""
    found: dict[Any, tuple[str, int, int]] = {}
    for number, (computation, each, times) in enumerate(_everywhere(module, runs)):
        kind = each.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        channel = re.search(r"channel_id=(\d+)", each.attributes)
        key = (kind, channel[1]) if channel else (kind, number)
        sent = _sent(module.computations[computation], each, kind, devices)
        if key not in found or found[key][1] < times:
            found[key] = kind, times, sent
    traffic: dict[str, Traffic] = {}
    for kind, times, sent in found.values():
        before = traffic.get(kind, Traffic(0, 0))
        traffic[kind] = Traffic(before.count + times, before.bytes + times * sent)
    return traffic


def _sent(inside: Mapping[str, Instruction], instruction: Instruction, kind: str, devices: int) -> int:
    """Bytes that each device sends, on a ring."""
    given = sum(array.bytes for name in instruction.operands if name in inside for array in inside[name].results)
    size = _group_size(instruction.attributes, devices)
    share = (size - 1) / size
    match kind:
        case "all-reduce":
            return round(2 * given * share)
        case "all-gather":
            return given * (size - 1)
        case "collective-permute":
            return given
        case _:
            return round(given * share)


def _group_size(attributes: str, devices: int) -> int:
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return devices
