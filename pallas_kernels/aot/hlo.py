"""Bytes that an optimised program of XLA moves, by its text.

The compiler for CUDA gives no account of them. Each instruction of a program
that is not within a fusion is a kernel: it reads its operands and writes its
result. Where a fusion only gathers or cuts from an operand, what it takes of it
counts, and where it scatters into one that stays where it is, the updates.
Loops count as often as they are known to run. A sort counts once, though a
device may go through a long row several times.
"""

import dataclasses
import math
import re

_INSTRUCTION = re.compile(
  r"^ *(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)$"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
# These give names to what is in memory already.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_TAKES = ("gather", "dynamic-slice")
# Opcode -> which operand the updates are.
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  def called(self, attribute: str) -> str | None:
    found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
    return found and found[1]


_Computation = dict[str, _Instruction]


def moved_bytes(text: str) -> int:
  """Bytes read and written by all kernels of a program.

  Args:
    text: Of `jax.stages.Compiled.as_text()`.

  Example:
    >>> moved_bytes(jax.jit(lambda x: x + 1).lower(x).compile().as_text())
  """
  computations, entry = _parse(text)
  return _moved(computations, entry)


def _moved(computations: dict[str, _Computation], name: str) -> int:
  computation = computations[name]
  total = 0
  for one in computation.values():
    if one.opcode == "while":
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest)
      steps = int(known[1]) if known else 1
      total += steps * _moved(computations, one.called("body"))
    elif one.opcode == "call":
      total += _moved(computations, one.called("to_apply"))
    elif one.opcode == "fusion":
      total += _moved_by_fusion(
        computations[one.called("calls")],
        [_bytes(computation[x].type) for x in one.operands],
      )
    elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
      total += _written(computation, one)
      for place, x in enumerate(one.operands):
        full = _bytes(computation[x].type)
        total += _taken(computation, one, place, full)
  return total


def _moved_by_fusion(fused: _Computation, operand_bytes: list[int]) -> int:
  (root,) = (x for x in fused.values() if x.is_root)
  total = _written(fused, root)
  for one in fused.values():
    if one.opcode == "parameter":
      number = int(one.operands[0])
      full = operand_bytes[number]
      uses = _uses(fused, one.name)
      read = sum(_taken(fused, user, place, full) for user, place in uses)
      total += min(full, read)
  return total


def _uses(fused: _Computation, name: str) -> list[tuple[_Instruction, int]]:
  """Who uses a value, and as which operand."""
  found = []
  for user in fused.values():
    for place, x in enumerate(user.operands):
      if x == name and user.opcode == "bitcast":
        found += _uses(fused, user.name)
      elif x == name:
        found.append((user, place))
  return found


def _taken(within: _Computation, user: _Instruction, place: int, full: int):
  """Bytes that an instruction needs of an operand of `full` bytes."""
  if place == 0 and user.opcode in _TAKES:
    return min(full, _bytes(user.type))
  if place == 0 and user.opcode in _UPDATES:
    # It stays where it is: what is scattered to is read and written.
    updates = user.operands[_UPDATES[user.opcode]]
    return min(full, _bytes(within[updates].type))
  return full


def _written(within: _Computation, one: _Instruction) -> int:
  if one.opcode == "tuple":
    return sum(_written(within, within[x]) for x in one.operands)
  if one.opcode == "bitcast":
    return _written(within, within[one.operands[0]])
  if one.opcode in _UPDATES:
    return _bytes(within[one.operands[_UPDATES[one.opcode]]].type)
  return _bytes(one.type)


def _bytes(type_: str) -> int:
  total = 0
  for kind, bits, sizes in _ARRAY.findall(type_):
    width = 8 if kind == "pred" else int(bits or 0)
    total += width * math.prod(int(n) for n in sizes.split(",") if n) // 8
  return total


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """Computations by name, and the name of the entry."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      current = computations.setdefault(found[2], {})
      entry = found[2] if found[1] else entry
    elif (found := _INSTRUCTION.match(line)) and current is not None:
      is_root, name, type_, opcode, operands, rest = found.groups()
      names = re.sub(r"/\*.*?\*/", "", operands).replace("%", "").split(",")
      names = tuple(x.strip().split(" ")[-1] for x in names if x.strip())
      if opcode == "constant":
        names = ()
      current[name] = _Instruction(
        name, type_, opcode, names, rest, bool(is_root)
      )
  return computations, entry
