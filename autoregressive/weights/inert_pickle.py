"""Reads a pickle as data: no name in it is resolved, nothing in it is called, and no value of it is
hashed.

What comes out are strings, numbers, tuples, lists, `Pairs` in the place of dictionaries, and
records of what the pickle would have called. Time and memory are bounded by the number of
instructions. Nothing here recurses, so nesting may be of any depth.
"""

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from typing import Any

# About 100 bytes of memory and 1 us each. A checkpoint of 1,000 weights with the optimizer's state
# has some 100,000.
MOST_INSTRUCTIONS = 1_000_000
_INT, _SHORT, _SIZE, _DOUBLE = map(struct.Struct, ("<i", "<H", "<I", ">d"))
_LONGEST_KEY = 8  # items of a tuple that is a key


class PickleRefused(Exception):
    """The pickle has something that no checkpoint needs; the message says what, as in "it calls a
    str".
    """


class UnknownName(PickleRefused):
    """It refers to a class or function that is not among the known names.

    Attributes:
        name: the name, with its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it refers to {name}")
        self.name = name


class OddKey(PickleRefused):
    """A dictionary has a key that is a tuple of many items, of tuples, or something else that none
    needs.
    """

    def __init__(self) -> None:
        super().__init__("it has a key that no checkpoint needs")


class Name:
    """A class, function or dtype that the pickle refers to: only its name, without the module."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Record:
    """What the pickle would have called and with what, and the state that it would have given to
    the outcome.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None


class Pairs(list[tuple[Any, Any]]):
    """A dictionary as the list of its keys and values: nothing is hashed, which a hostile key could
    make take for ever.
    """

    __slots__ = ()

    def entries(self) -> dict[str, Any]:
        """Those whose keys are strings. Of two with the same key, the later one."""
        return {key: value for key, value in self if type(key) is str}


class _OrderedPairs(Pairs):
    """An OrderedDict, which may be given attributes; they are dropped."""

    __slots__ = ()


def kind_of(value: object) -> str:
    """What a value is, for a message; its content is left out, for it may be hostile."""
    if isinstance(value, Pairs):
        return "dict"
    return value.kind if type(value) is Record else type(value).__name__


class InertUnpickler:
    """Reads one pickle, or several that lie one behind the other.

    Args:
        data: holds the pickles, and maybe more behind them.
        known_names: with their modules; all others are refused.
        storages: whether it may refer to storages of tensors, as `torch.save` does; they are
            collected in `storage_ids`.
        most_instructions: of one pickle; more are refused.

    Attributes:
        position: where the next pickle starts.
        storage_ids: as the pickles have them.
    """

    def __init__(
        self,
        data: bytes,
        known_names: Collection[str],
        *,
        storages: bool = False,
        most_instructions: int = MOST_INSTRUCTIONS,
    ) -> None:
        self.position = 0
        self.storage_ids: list[tuple[Any, ...]] = []
        self._data, self._known_names, self._storages = data, known_names, storages
        self._most_instructions = most_instructions
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the next pickle.

        Raises:
            PickleRefused: it has something that no checkpoint needs.
            Exception: it is damaged, which shows in many ways.
        """
        data, instructions, stop = self._data, _INSTRUCTIONS, ord(".")
        self._stack, self._marks, self._memo = [], [], {}
        for _ in range(self._most_instructions):
            code = data[self.position]
            self.position += 1
            if code == stop:
                return self._stack.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise PickleRefused("it has an instruction that none needs")
            instruction(self)
        raise PickleRefused(f"it has more than {self._most_instructions:,} instructions")

    def _take(self, size: int) -> bytes:
        start = self.position
        self.position = start + size
        if self.position > len(self._data):
            raise EOFError
        return self._data[start : self.position]

    def _byte(self) -> int:
        position = self.position
        self.position = position + 1
        return self._data[position]

    def _number(self, layout: struct.Struct) -> Any:
        position = self.position
        self.position = position + layout.size
        return layout.unpack_from(self._data, position)[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self.position)
        line = self._data[self.position : end].decode()
        self.position = end + 1
        return line

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    # --- numbers and texts ---

    def _push_byte(self) -> None:
        self._stack.append(self._byte())

    def _push_number(self, layout: struct.Struct) -> None:
        self._stack.append(self._number(layout))

    def _push_long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._byte()), "little", signed=True))

    def _push_text(self, size: int) -> None:
        self._stack.append(self._take(size).decode("utf-8", "surrogatepass"))

    def _push_bytes(self, size: int) -> None:
        self._stack.append(self._take(size))

    # --- memo ---

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    # --- containers ---

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise EOFError
        self._stack[-count:] = [items]

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleRefused(f"it appends to a {kind_of(target)}")
        target.extend(items)

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target, keys = self._stack[-1], items[::2]
        if not isinstance(target, Pairs):
            raise PickleRefused(f"it sets an item of a {kind_of(target)}")
        if not all(map(_may_be_key, keys)):
            raise OddKey
        target.extend(zip(keys, items[1::2], strict=True))

    # --- names and what is done with them ---

    def _global(self) -> None:
        self._push_name(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise PickleRefused("a name is no text")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        # Python 3 writes protocol 2 with the names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full not in self._known_names:
            raise UnknownName(full)
        self._stack.append(Name(name))

    def _call(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if type(called) is not Name or type(arguments) is not tuple:
            raise PickleRefused(f"it calls a {kind_of(called)}")
        # Counter is a dictionary too; its argument is one. An OrderedDict of old has a list of its
        # items.
        self._stack.append(
            _OrderedPairs()
            if called.name == "OrderedDict" and not arguments
            else Record(called.name, arguments)
        )

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is _OrderedPairs:
            return
        if type(target) is not Record or target.state is not None:
            raise PickleRefused(f"it changes a {kind_of(target)}")
        target.state = state

    def _persistent(self) -> None:
        storage = self._stack.pop()
        if (
            not self._storages
            or type(storage) is not tuple
            or not storage
            or storage[0] not in ("storage", b"storage")
        ):
            raise PickleRefused("it refers to something outside of itself")
        self.storage_ids.append(storage)
        self._stack.append(Record("storage", storage))


def _may_be_key(value: object) -> bool:
    plain = (str, int, float, bool, bytes, type(None))
    if type(value) is tuple:
        return len(value) <= _LONGEST_KEY and all(type(item) in plain for item in value)
    return type(value) in (*plain, Name, Record)


# All that Python writes for what `torch.save` and torch.distributed.checkpoint are given (protocols
# 2 to 5).
_INSTRUCTIONS: dict[int, Callable[[InertUnpickler], object]] = {
    ord(code): instruction
    for code, instruction in {
        "\x80": lambda self: self._take(1),  # PROTO
        "\x95": lambda self: self._take(8),  # FRAME
        "N": lambda self: self._stack.append(None),
        "\x88": lambda self: self._stack.append(True),
        "\x89": lambda self: self._stack.append(False),
        "J": lambda self: self._push_number(_INT),  # BININT
        "K": InertUnpickler._push_byte,  # BININT1
        "M": lambda self: self._push_number(_SHORT),  # BININT2
        "G": lambda self: self._push_number(_DOUBLE),  # BINFLOAT
        "\x8a": InertUnpickler._push_long,  # LONG1
        "\x8c": lambda self: self._push_text(self._byte()),  # SHORT_BINUNICODE
        "X": lambda self: self._push_text(self._number(_SIZE)),  # BINUNICODE
        "U": lambda self: self._push_bytes(self._byte()),  # SHORT_BINSTRING
        "C": lambda self: self._push_bytes(self._byte()),  # SHORT_BINBYTES
        "B": lambda self: self._push_bytes(self._number(_SIZE)),  # BINBYTES
        "\x94": InertUnpickler._memoize,
        "q": lambda self: self._put(self._byte()),  # BINPUT
        "r": lambda self: self._put(self._number(_SIZE)),  # LONG_BINPUT
        "h": lambda self: self._get(self._byte()),  # BINGET
        "j": lambda self: self._get(self._number(_SIZE)),  # LONG_BINGET
        "(": InertUnpickler._mark,
        ")": lambda self: self._stack.append(()),  # EMPTY_TUPLE
        "\x85": lambda self: self._tuple_of(1),
        "\x86": lambda self: self._tuple_of(2),
        "\x87": lambda self: self._tuple_of(3),
        "t": InertUnpickler._tuple,
        "]": lambda self: self._stack.append([]),  # EMPTY_LIST
        "a": InertUnpickler._append,
        "e": lambda self: self._extend(self._pop_to_mark()),  # APPENDS
        "}": lambda self: self._stack.append(Pairs()),  # EMPTY_DICT
        "s": InertUnpickler._set_item,
        "u": lambda self: self._set_items(self._pop_to_mark()),  # SETITEMS
        "c": InertUnpickler._global,
        "\x93": InertUnpickler._stack_global,
        "R": InertUnpickler._call,  # REDUCE
        "\x81": InertUnpickler._call,  # NEWOBJ
        "b": InertUnpickler._build,
        "Q": InertUnpickler._persistent,  # BINPERSID
    }.items()
}
