"""Pickled records read without running anything: the opcodes are walked, no class is imported."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from unembed.errors import StoreError

_LARGEST = 64 << 20
_MARK = object()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_VALUES = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINBYTES",
    "BINBYTES",
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Record(dict[str, Any]):
    """The fields of a record of the client."""


def read_record(data: bytes, module: str, classes: frozenset[str], where: str) -> Any:
    """The plain data in a pickle that holds records of a client and nothing else.

    A pickle is a program, and whoever loads one runs it. This walks through its opcodes and
    follows only those that make numbers, text, lists, dictionaries and records of the classes
    named; records become dictionaries of their fields. No class is ever looked up.

    Args:
        data: The pickle.
        module: That the classes are of.
        classes: Their names.
        where: For messages.

    Raises:
        StoreError: It does anything else; nothing of it was run.
    """
    if len(data) > _LARGEST:
        raise _refusal(where, f"one of {len(data)} bytes")
    try:
        return _Walk(module, classes, where).run(data)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(where, f"a damaged one ({error})") from error


class _Walk:
    """The stack of one pickle."""

    def __init__(self, module: str, classes: frozenset[str], where: str) -> None:
        self._module, self._classes, self._where = module, classes, where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Follow the opcodes to the end."""
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in ("PROTO", "FRAME"):
                continue
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _VALUES:
                self._stack.append(argument)
            elif name in _TUPLES:
                self._tuple(_TUPLES[name])
            else:
                self._combine(name, argument)
        raise ValueError("no end")

    def _combine(self, name: str, argument: Any) -> None:
        action = getattr(self, f"_{name.lower()}", None)
        if action is None:
            raise _refusal(self._where, f"one with the opcode {name}")
        action(argument)

    def _tuple(self, size: int) -> None:
        items = tuple(self._stack[-size:])
        del self._stack[-size:]
        self._stack.append(items)

    def _after_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _mark(self, argument: Any) -> None:
        self._stack.append(_MARK)

    def _memoize(self, argument: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binput(self, argument: Any) -> None:
        self._memo[argument] = self._stack[-1]

    _long_binput = _binput

    def _binget(self, argument: Any) -> None:
        self._stack.append(self._memo[argument])

    _long_binget = _binget

    def _append(self, argument: Any) -> None:
        item = self._stack.pop()
        self._stack[-1].append(item)

    def _appends(self, argument: Any) -> None:
        items = self._after_mark()
        self._stack[-1].extend(items)

    _additems = _appends

    def _setitem(self, argument: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._stack[-1][key] = value

    def _setitems(self, argument: Any) -> None:
        items = self._after_mark()
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _stack_global(self, argument: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if module != self._module or name not in self._classes:
            raise _refusal(self._where, f"one that names {module}.{name}, which was not run")
        self._stack.append(_Record)

    def _newobj(self, argument: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if kind is not _Record or arguments != ():
            raise _refusal(self._where, "one that makes objects in another way")
        self._stack.append(_Record())

    def _build(self, argument: Any) -> None:
        state, record = self._stack.pop(), self._stack[-1]
        if type(record) is not _Record or not isinstance(state, dict):
            raise _refusal(self._where, "one that fills objects in another way")
        record.update(state["__dict__"])


def _refusal(where: str, what: str) -> StoreError:
    return StoreError(
        f"pickles of the client's own records in {where}",
        what,
        "Do not open this folder with the client: it would run the pickle. Export the collection "
        "where it was made",
    )
