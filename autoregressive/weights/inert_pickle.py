"""Reads a pickle as data: no name in it is resolved, nothing in it is called, and no value of it is
hashed.

`pickletools` decodes the instructions and builds nothing. What comes out are
strings, numbers, tuples, lists, `Pairs` in the place of dictionaries, and records of what the
pickle would have called. Time and memory are bounded by the number of instructions. Nothing here
recurses, so nesting may be of any depth.
"""

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from itertools import islice
from typing import Any

# About 100 bytes of memory and 1 us each. A checkpoint of 1,000 weights with the optimizer's state
# has some 100,000.
MOST_INSTRUCTIONS = 1_000_000
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
        self.storage_ids: list[tuple[Any, ...]] = []
        self._stream, self._known_names, self._storages = io.BytesIO(data), known_names, storages
        self._most_instructions = most_instructions
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    @property
    def position(self) -> int:
        """Where the next pickle starts."""
        return self._stream.tell()

    def load(self) -> Any:
        """The value of the next pickle.

        Raises:
            PickleRefused: it has something that no checkpoint needs.
            Exception: it is damaged, which shows in many ways.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for instruction, argument, _ in islice(
            pickletools.genops(self._stream), self._most_instructions
        ):
            if instruction.name == "STOP":
                return self._stack.pop()
            if instruction.name not in _INSTRUCTIONS:
                raise PickleRefused("it has an instruction that none needs")
            _INSTRUCTIONS[instruction.name](self, argument)
        raise PickleRefused(f"it has more than {self._most_instructions:,} instructions")

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise EOFError
        self._stack[-count:] = [items]

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleRefused(f"it appends to a {kind_of(target)}")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target, keys = self._stack[-1], items[::2]
        if not isinstance(target, Pairs):
            raise PickleRefused(f"it sets an item of a {kind_of(target)}")
        if not all(map(_may_be_key, keys)):
            raise OddKey
        target.extend(zip(keys, items[1::2], strict=True))

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
# 2 to 5), by the names that `pickletools` has for it. Each gets the instruction's argument.
_INSTRUCTIONS: dict[str, Callable[[InertUnpickler, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda self, value: None),
    "NONE": lambda self, _: self._stack.append(None),
    "NEWTRUE": lambda self, _: self._stack.append(True),
    "NEWFALSE": lambda self, _: self._stack.append(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        lambda self, number: self._stack.append(number),
    ),
    **dict.fromkeys(
        ("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
        lambda self, text: self._stack.append(text),
    ),
    # Python 2's strings, of which `pickletools` makes texts
    "SHORT_BINSTRING": lambda self, value: self._stack.append(value.encode("latin-1")),
    "MEMOIZE": lambda self, _: self._memo.update({len(self._memo): self._stack[-1]}),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"), lambda self, index: self._memo.update({index: self._stack[-1]})
    ),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"), lambda self, index: self._stack.append(self._memo[index])
    ),
    "MARK": lambda self, _: self._marks.append(len(self._stack)),
    "EMPTY_TUPLE": lambda self, _: self._stack.append(()),
    "TUPLE1": lambda self, _: self._tuple_of(1),
    "TUPLE2": lambda self, _: self._tuple_of(2),
    "TUPLE3": lambda self, _: self._tuple_of(3),
    "TUPLE": lambda self, _: self._stack.append(tuple(self._pop_to_mark())),
    "EMPTY_LIST": lambda self, _: self._stack.append([]),
    "APPEND": lambda self, _: self._extend([self._stack.pop()]),
    "APPENDS": lambda self, _: self._extend(self._pop_to_mark()),
    "EMPTY_DICT": lambda self, _: self._stack.append(Pairs()),
    "SETITEM": lambda self, _: self._set_items([self._stack.pop(), self._stack.pop()][::-1]),
    "SETITEMS": lambda self, _: self._set_items(self._pop_to_mark()),
    "GLOBAL": lambda self, value: self._push_name(*value.split(" ", 1)),
    "STACK_GLOBAL": lambda self, _: self._stack_global(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda self, _: self._call()),
    "BUILD": lambda self, _: self._build(),
    "BINPERSID": lambda self, _: self._persistent(),
}
