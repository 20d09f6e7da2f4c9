"""PyTorch's pickles of tensors, read without Python's unpickler: opcodes are interpreted here, one after another.

The standard library's unpickler can be kept from calling functions, but not from wasting resources: a memo index
allocates that many slots, and a key of nested tuples takes forever to hash. This interpreter refuses every opcode that
tensors do not need, allows only strings as keys, lets calls create only dictionaries and tensors, and limits how much
is read. Of what PyTorch Lightning adds to a checkpoint, callbacks and the like, nothing is made.
"""

import io
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

MAX_BYTES = 1 << 25
"""The limit for one pickle of tensors: a hundred thousand take no more."""
MAX_DIMENSIONS = 32
"""The limit for one tensor. Networks' tensors have four."""
_MAX_ARGUMENTS = 16  # of one call, which may be repeated with the same ones
_MAX_ITEMS = 1 << 20  # of all lists passed to calls, in total
_MAX_LINE = 1 << 12  # for opcodes whose argument ends with its line: module names

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "Float8_e4m3fn": "float8_e4m3fn", "Float8_e5m2": "float8_e5m2",
}  # fmt: skip


class RefusedError(ValueError):
    """A pickle names something that is neither a tensor nor made of tensors; the message is its name."""


class Storage(NamedTuple):
    """The numbers that tensors are views of."""

    key: str
    dtype: str
    start: int  # in elements: a legacy storage can be a view of another


class PickledTensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(file: io.BufferedIOBase, size: int, limit: int = MAX_BYTES) -> tuple[Any, dict[str, str]]:
    """Reads the pickle at the position of a file and moves behind it.

    Args:
      file: a file open for reading.
      size: the file size in bytes; no opcode's argument is longer than the rest of the file.
      limit: the number of bytes after which a pickle is too long.

    Returns:
      The contents, dictionaries with `PickledTensor` at their leaves, and the dtype of every storage by its key.

    Raises:
      RefusedError: if it names anything that tensors do not need.
      ValueError: if it is damaged, or holds something other than tensors.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(_Bounded(file, size, limit)):  # pyright: ignore[reportArgumentType]
        if opcode.name == "STOP":
            (content,) = machine.stack
            return content, machine.storages
        machine.run(opcode.name, argument)
    raise ValueError("it has no end")


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape that a file gives, as a tuple.

    Raises:
      ValueError: if it is not the shape of a tensor.
    """
    if not isinstance(shape, tuple | list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("the shape of a tensor is not a list of at most 32 numbers")
    if not all(_is_int(number) and 0 <= number < 1 << 48 for number in shape):
        raise ValueError("the shape of a tensor holds something other than sizes")
    return tuple(shape)


class _Bounded:
    """A file that is read no further than a pickle's limit and the end of the file."""

    def __init__(self, file: io.BufferedIOBase, size: int, limit: int) -> None:
        self._file = file
        self._left = min(size - file.tell(), limit)

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise EOFError(f"an opcode needs {count} bytes, and there are {self._left}")
        return self._counted(self._file.read(count))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(min(_MAX_LINE, self._left)))

    def _counted(self, content: bytes) -> bytes:
        self._left -= len(content)
        return content


class _Call(NamedTuple):
    """A function that a pickle may call."""

    function: Callable[..., Any]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
    return _tensor(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> PickledTensor:
    return _tensor(storage, dtype, offset, shape, strides)


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, str) or not _is_int(offset) or offset < 0:
        raise ValueError("a tensor is not a view of a storage")
    shape, strides = checked_shape(shape), checked_shape(strides)
    if len(shape) != len(strides):
        raise ValueError("the strides and dimensions of a tensor differ in number")
    return PickledTensor(storage, dtype, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> PickledTensor:
    if not isinstance(tensor, PickledTensor):
        raise ValueError("a parameter is not a tensor")
    return tensor


def _dictionary(items: Any = ()) -> dict[str, Any]:
    """An ``OrderedDict``: empty, or as Python 2 pickled it, with a list of its items."""
    made: dict[str, Any] = {}
    for key, value in items:
        _set_item(made, key, value)
    return made


def _set_item(target: Any, key: Any, value: Any) -> None:
    if target is _UNNEEDED or key is _UNNEEDED:
        return
    # For other keys, hashing alone could take forever.
    if not isinstance(target, dict) or not (isinstance(key, str) or _is_int(key)):
        raise ValueError("it sets something other than a named entry of a dictionary")
    target[key] = value


_UNNEEDED = object()
"""What a checkpoint of PyTorch Lightning holds besides tensors: never made, and nothing comes of using it."""
_OF_LIGHTNING = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\..*"
    r"|numpy\.(_?core\.multiarray\.scalar|dtype)|_codecs\.encode|typing\.Any"
    r"|collections\.defaultdict|(__builtin__|builtins)\.(dict|int|list|float|str|bool)"
)

# All else that a pickle may name. Dtypes are strings.
_NAMES: Mapping[str, Any] = {
    "collections.OrderedDict": _Call(_dictionary),
    "torch.Size": _Call(checked_shape),
    "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Call(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Call(_rebuild_parameter),
    "torch.storage.UntypedStorage": "uint8",
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.{dtype}": dtype for dtype in _STORAGES.values()},
    **{f"torch.uint{bits}": f"uint{bits}" for bits in (16, 32, 64)},
}

_MARK = object()
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "MARK": lambda: _MARK,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})


class _Machine:
    """The stack and the memo of a pickle, and what its opcodes do with them (see `pickletools`)."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, str] = {}
        self._items = 0
        self._memo: dict[int, Any] = {}  # a dictionary, so that large indices take no memory

    def run(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop_many(_TUPLES[opcode])))
        elif opcode in _PUTS:
            self._memo[argument] = self._top()
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif opcode in _GETS:
            self.stack.append(self._memo[argument])
        elif opcode not in ("PROTO", "FRAME"):
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise ValueError(f"it has the opcode {opcode}, which no file of tensors needs")
            operation(self, argument)

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its stack is empty")
        return self.stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _pop_many(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        popped = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return popped[::-1]
            popped.append(value)
        raise ValueError("its stack has no mark")

    def _named(self, argument: str) -> None:
        self.stack.append(_find(*argument.split(" ", 1)))

    def _named_on_stack(self, _: None) -> None:
        self.stack.append(_find(*self._pop_many(2)))

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _list(self, _: None) -> None:
        self.stack.append(self._pop_to_mark())

    def _dict(self, _: None) -> None:
        self.stack.append(_dictionary(_pairs(self._pop_to_mark())))

    def _append(self, _: None) -> None:
        self._extend([self._pop()])

    def _append_all(self, _: None) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if target is _UNNEEDED:
            return
        if not isinstance(target, list):
            raise ValueError("it appends to something other than a list")
        target.extend(values)

    def _set(self, _: None) -> None:
        key, value = self._pop_many(2)
        _set_item(self._top(), key, value)

    def _set_all(self, _: None) -> None:
        for key, value in _pairs(self._pop_to_mark()):
            _set_item(self._top(), key, value)

    def _reduce(self, _: None) -> None:
        function, arguments = self._pop_many(2)
        if function is _UNNEEDED:
            self.stack.append(_UNNEEDED)
            return
        if not isinstance(function, _Call) or not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise ValueError("it calls something other than a function")
        self._items += sum(len(argument) for argument in arguments if isinstance(argument, list | tuple))
        if self._items > _MAX_ITEMS:
            raise ValueError("its calls have too many arguments")
        self.stack.append(function.function(*arguments))

    def _make(self, _: None) -> None:
        kind, _arguments = self._pop_many(2)
        if kind is not _UNNEEDED:
            raise ValueError("it makes something other than a tensor")
        self.stack.append(_UNNEEDED)

    def _build(self, _: None) -> None:
        self._pop()  # attributes of a state dict, such as module versions: not needed
        if not isinstance(self._top(), dict) and self._top() is not _UNNEEDED:
            raise ValueError("it sets attributes of something other than a dictionary")

    def _storage(self, _: None) -> None:
        identity = self._pop()
        if not isinstance(identity, tuple) or not 5 <= len(identity) <= 6:
            raise ValueError("it refers to something other than a storage")
        kind, dtype, key, _location, _numel, *view = identity
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise ValueError("it refers to something other than a storage")
        _, start, _ = view[0] if view and isinstance(view[0], tuple) and len(view[0]) == 3 else (None, 0, None)
        if not _is_int(start) or start < 0:
            raise ValueError("a storage begins outside of the storage that it is a view of")
        self.storages[key] = dtype
        self.stack.append(Storage(key, dtype, start))


_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _Machine._named,
    "STACK_GLOBAL": _Machine._named_on_stack,
    "TUPLE": _Machine._tuple,
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._append_all,
    "SETITEM": _Machine._set,
    "SETITEMS": _Machine._set_all,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._make,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._storage,
}


def _find(module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it looks up something other than a name")
    if (found := _NAMES.get(f"{module}.{name}")) is not None:
        return found
    if _OF_LIGHTNING.fullmatch(f"{module}.{name}"):
        return _UNNEEDED
    raise RefusedError(f"{module}.{name}"[:200])


def _pairs(values: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)
