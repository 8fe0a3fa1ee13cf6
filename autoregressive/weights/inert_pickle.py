"""Reads a pickle as data: no name in it is resolved, nothing of its own is called, and no value of
it is hashed.

The standard library's unpickler in Python decodes the instructions. Here it knows only those that
checkpoints need, and for names, calls and dictionaries it puts inert values on its stack: `Name`,
`Record` and `Pairs`. The rest are strings, numbers, tuples and lists. Time and memory are bounded
by the number of instructions. Nothing here recurses, so nesting may be of any depth.
"""

import itertools
import pickle
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO, ClassVar

from autoregressive.weights.stored_tensor import BadContentError, require

# About 100 bytes of memory and 2 us each. A checkpoint of 1,000 weights with the optimizer's state
# has some 100,000.
MOST_INSTRUCTIONS = 1_000_000
_MOST_ARGUMENTS = 16  # of a call that builds a tensor; torch writes up to ten


class UnknownName(BadContentError):
    """The pickle refers to a class or function that is not among the known names.

    Attributes:
        name: the name, with its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it refers to {name}")
        self.name = name


class Name:
    """A class, function or dtype that the pickle refers to: only its name, without the module.

    Args:
        builder: what a call of it in the pickle calls instead. None: a `Record` of it is kept.
    """

    __slots__ = ("_builder", "name")

    def __init__(self, name: str, builder: Callable[..., object] | None) -> None:
        self.name, self._builder = name, builder

    def call(self, arguments: tuple[Any, ...]) -> object:
        """What a call of it becomes. A pickle can give one long tuple to thousands of calls, so a
        record keeps the tuple itself, and a builder takes few arguments.
        """
        if self._builder is None:
            return Record(self.name, arguments)
        require(len(arguments) <= _MOST_ARGUMENTS, f"it calls {self.name} with too many arguments")
        return self._builder(*arguments)


class Record:
    """What the pickle would have called and with what, and the state that it would have given to
    the outcome.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None


class Pairs(Record):
    """A dictionary as the list of its keys and values: nothing is hashed, which a hostile key could
    make take for ever. An OrderedDict may be given attributes, which are its state.
    """

    __slots__ = ("items",)

    def __init__(self) -> None:
        super().__init__("dict")
        self.items: list[tuple[Any, Any]] = []

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def entries(self) -> dict[str, Any]:
        """Those whose keys are strings. Of two with the same key, the later one."""
        return {key: value for key, value in self.items if type(key) is str}


def kind_of(value: object) -> str:
    """What a value is, for a message; its content is left out, for it may be hostile."""
    return value.kind if isinstance(value, Record) else type(value).__name__


def read_pickle(
    stream: BinaryIO,
    known_names: Collection[str],
    *,
    builders: Mapping[str, Callable[..., object]] | None = None,
    storage: Callable[[Any], object] | None = None,
    most_instructions: int = MOST_INSTRUCTIONS,
) -> Any:
    """Reads one pickle and leaves the stream behind it.

    Args:
        stream: in memory, for it is read byte by byte.
        known_names: with their modules; all others are refused.
        builders: what to call in the place of a known name, by the name with its module; a
            `Record` is made of the others.
        storage: what to make of a reference to a tensor's storage, as `torch.save` writes it; such
            references are refused without it.
        most_instructions: more are refused.

    Raises:
        BadContentError: it has something that no checkpoint needs; the message says what.
        Exception: it is damaged, which shows in many ways.
    """
    start = stream.tell()
    instructions = itertools.islice(pickletools.genops(stream), most_instructions + 1)
    count = sum(1 for _ in instructions)
    require(count <= most_instructions, f"it has more than {most_instructions:,} instructions")
    stream.seek(start)
    unpickler = _InertUnpickler(stream, encoding="bytes")  # Python 2's strings are bytes
    unpickler.known_names, unpickler.storage = known_names, storage
    unpickler.builders = {"collections.OrderedDict": _ordered_dictionary} | dict(builders or {})
    return unpickler.load()


def _ordered_dictionary(*arguments: Any) -> Record:
    # One of old has a list of its items.
    return Record("OrderedDict", arguments) if arguments else Pairs()


class _InertUnpickler(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[object], None]
    known_names: Collection[str]
    builders: Mapping[str, Callable[..., object]]
    storage: Callable[[Any], object] | None

    def find_class(self, module: str, name: str) -> Name:
        # Python 3 writes protocol 2 with the names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full not in self.known_names:
            raise UnknownName(full)
        return Name(name, self.builders.get(full))

    def persistent_load(self, pid: Any) -> object:
        refers = type(pid) is tuple and pid and pid[0] in ("storage", b"storage")
        if self.storage is None or not refers:
            raise BadContentError("it refers to something outside of itself")
        return self.storage(pid)

    def load_dictionary(self) -> None:
        self.append(Pairs())

    def load_call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        require(type(called) is Name and type(arguments) is tuple, f"it calls a {kind_of(called)}")
        self.append(called.call(arguments))

    def load_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        require(
            isinstance(target, Record) and target.state is None,
            f"it changes a {kind_of(target)}",
        )
        target.state = state

    def refuse(self) -> None:
        raise BadContentError("it has an instruction that none needs")

    # All that Python writes for what `torch.save` and torch.distributed.checkpoint are given
    # (protocols 2 to 5).
    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), refuse) | {
        code: pickle._Unpickler.dispatch[code]
        for code in b"".join((
            pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
            pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
            pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.SHORT_BINBYTES, pickle.BINBYTES,
            pickle.SHORT_BINSTRING, pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT,
            pickle.BINGET, pickle.LONG_BINGET, pickle.MARK, pickle.EMPTY_TUPLE, pickle.TUPLE1,
            pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE, pickle.EMPTY_LIST, pickle.APPEND,
            pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL,
            pickle.BINPERSID,
        ))
    } | {
        pickle.EMPTY_DICT[0]: load_dictionary,
        pickle.REDUCE[0]: load_call,
        pickle.NEWOBJ[0]: load_call,
        pickle.BUILD[0]: load_state,
    }  # fmt: skip
