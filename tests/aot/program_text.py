"""Reads a compiled program's text: arrays that are moved, copies of what should be read where it lies, and what a loop
launches."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\(")
CALLED = re.compile(r"calls=%?([\w.\-]+)")
REACHED = re.compile(r"(?:calls|body|condition|to_apply|computations?)=(\{[^}]*\}|%?[\w.\-]+)")
NAME = re.compile(r"[\w.\-]+")
OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
OWN = re.compile(r' custom-call\(.*custom_call_target="(?:mosaic_gpu_v2|__cublas\$lt\$matmul)"')
"""A kernel of ours, or a product."""

NO_LAUNCH = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
"""Operations that are names for memory, or an order."""

MOVING = {"copy", "copy-start", "slice", "dynamic-slice", "transpose", "concatenate", "pad", "fusion"}
IN_PLACE = {"scatter", "dynamic-update-slice"}
"""A fusion with one of these writes into its operand."""


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: tuple[int, ...]
    opcode: str
    line: str


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation whose result is one array."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            current = found.setdefault(match[1], [])
        elif match := INSTRUCTION.match(line):
            shape = tuple(int(size) for size in match[2].split(",") if size)
            current.append(Instruction(match[1], shape, match[3], line.strip()))
    return found


def essential(shape: Iterable[int]) -> tuple[int, ...]:
    """Sizes without ones, in order of size: the same for an array and its slices of one layer, however transposed."""
    return tuple(sorted(size for size in shape if size > 1))


def moved(text: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Instructions that make an array of one of the shapes by moving another; those inside fusions do not count, what a
    fusion makes does."""
    wanted = {essential(shape) for shape in shapes}
    parts = computations(text)
    fused = set(CALLED.findall(text))
    return [
        f"{each.name}: {each.opcode} {list(each.shape)}"
        for name, part in parts.items()
        if name not in fused
        for each in part
        if each.opcode in MOVING and essential(each.shape) in wanted and not writes_in_place(each, parts)
    ]


def forgotten_results(text: str) -> list[str]:
    """Kernels that write into an operand from inside a fusion, which passes no such result on."""
    fused = set(CALLED.findall(text))
    found, inside = [], ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            inside = match[1]
        elif inside in fused and "mosaic_gpu_v2" in line and "output_to_operand_aliasing" in line:
            found.append(f"{inside}: {line.split(' = ')[0].strip()}")
    return found


def launched(text: str, loop: str) -> list[str]:
    """What the compiler made of everything but products and kernels of ours in the body of the loop with this name, in
    order: each is a kernel, or a copy, of its own. Operations that are not known to launch nothing count."""
    lines = lines_of(text)
    calling = {name for name, inside in lines.items() if any(OWN.search(line) for line in inside)}
    found = []
    for line in lines[loop_body(text, loop)]:
        name, opcode = OPERATION.match(line).groups()
        own = OWN.search(line) or not calling.isdisjoint(CALLED.findall(line))
        if opcode not in NO_LAUNCH and not opcode.endswith("-done") and not own:
            found.append(name)
    return found


def loop_body(text: str, loop: str) -> str:
    """Name of the computation that a loop repeats."""
    (body,) = set(re.findall(rf' while\(.*body=%?([\w.\-]+),.*op_name="[^"]*{loop}"', text))
    return body


def entry(text: str) -> str:
    """Name of the computation that the program begins with."""
    return COMPUTATION.match(re.search("^ENTRY .*", text, re.MULTILINE)[0])[1]


def opcodes(text: str, computation: str) -> set[str]:
    """Of the operations of a computation and of all that it calls."""
    lines, found, ahead, seen = lines_of(text), set(), [computation], set()
    while ahead:
        seen.add(name := ahead.pop())
        found |= {OPERATION.match(line)[2] for line in lines[name]}
        called = {each for line in lines[name] for names in REACHED.findall(line) for each in NAME.findall(names)}
        ahead += called - seen
    return found


def lines_of(text: str) -> dict[str, list[str]]:
    """The instructions of each computation."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            current = found.setdefault(match[1], [])
        elif found and line.startswith(" "):
            current.append(line)
    return found


def writes_in_place(fusion: Instruction, parts: dict[str, list[Instruction]]) -> bool:
    return any(each.opcode in IN_PLACE for called in CALLED.findall(fusion.line) for each in parts.get(called, ()))
