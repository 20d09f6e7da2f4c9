"""Model configurations: the ``config.json`` of diffusers and transformers, read strictly.

A configuration is a frozen dataclass with one field per key of the file. The annotation of a field says what this
package can compute: ``Literal[False]`` or ``None`` marks a feature that the file may name but that is not implemented,
so that a model that uses it is refused by name instead of giving wrong images.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

Config = TypeVar("Config", bound="ModelConfig")

Params = dict[str, Any]
"""A tree of parameters: nested dicts, module names above, arrays (or their shapes) at the leaves."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed range of a field, inclusive: far beyond any real model, but quick to build with."""

    low: float | int
    high: float | int

    def __contains__(self, value: float | int) -> bool:
        return self.low <= value <= self.high  # false for NaN


Channels = Annotated[int, Range(1, 1 << 16)]
"""How wide something is: features, or heads, or groups of them."""
Layers = Annotated[int, Range(1, 10)]
"""The number of residual blocks per resolution."""
Depth = Annotated[int, Range(0, 64)]
"""The number of consecutive transformer blocks."""
Side = Annotated[int, Range(1, 1 << 16)]
"""The size of an image or its latents."""
Token = Annotated[int, Range(0, 1 << 24)]
"""A token id."""
Epsilon = Annotated[float, Range(1e-12, 0.1)]
"""A constant added to a variance."""

_MAX_ENTRIES = 12  # of lists, which have one entry per block


class WeightsError(ValueError):
    """Weights cannot be found, read, matched or written; the message names the file and the remedy."""


class ConfigError(ValueError):
    """A configuration that this package cannot build exactly; the message names the file, the key and the value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of all model configurations: strict reading from, and complete writing to, a ``config.json`` mapping."""

    class_names: ClassVar[tuple[str, ...]] = ()
    """Values of ``_class_name`` that this configuration reads; the first is the one that it writes."""

    ignored_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that are known not to affect what the network computes."""

    averaging_keys: ClassVar[frozenset[str]] = frozenset({
        "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
    })  # fmt: skip
    """How diffusers made a moving average of parameters, which it writes into the average's configuration."""

    @classmethod
    def from_dict(cls: type[Config], mapping: Mapping[str, Any], where: str = "config.json") -> Config:
        """Reads a configuration.

        Args:
          mapping: the parsed ``config.json``.
          where: the name of the file, for messages.

        Returns:
          The configuration, with the defaults of diffusers or transformers for keys that are absent.

        Raises:
          ConfigError: for another class of model, an unknown key or an unsupported value.
        """
        cls._check_class(mapping, where)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, value in mapping.items():
            if key.startswith("_") or key in cls.ignored_keys | cls.averaging_keys:
                continue
            if key not in fields:
                raise ConfigError(
                    f"{where}: the key {key!r:.80} (value {value!r:.80}) is not one that {cls.class_names[0]} is known "
                    "to have; remove it if it has no effect on the model."
                )
            value, kind = _freeze(value), fields[key].type
            if not _matches(value, kind):
                raise ConfigError(
                    f"{where}: {key} = {value!r:.80} is not supported; codi_jax can build {_describe(kind)}."
                )
            values[key] = float(value) if _is_float(kind) else value
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the complete ``config.json`` mapping: every key, including defaults, as plain JSON values."""
        values = {field.name: _thaw(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"_class_name": self.class_names[0], **values}

    @classmethod
    def _check_class(cls, mapping: Mapping[str, Any], where: str) -> None:
        name = mapping.get("_class_name")
        if name is not None and name not in cls.class_names:
            raise ConfigError(f"{where}: this is the configuration of a {name}, not of a {cls.class_names[0]}.")


def per_block(value: Any, num_blocks: int, key: str) -> tuple:
    """Spreads a scalar over the blocks, or checks that a sequence has one entry for each block.

    Raises:
      ConfigError: if a sequence has another length than ``num_blocks``; ``key`` is named.
    """
    if not isinstance(value, tuple):
        return (value,) * num_blocks
    if len(value) != num_blocks:
        raise ConfigError(f"{key} has {len(value)} entries, but the model has {num_blocks} blocks.")
    return value


def require_even(config: Any, *keys: str) -> None:
    """Raises `ConfigError` unless these widths of sinusoidal embeddings are even or ``None``."""
    for key in keys:
        if (getattr(config, key) or 0) % 2:
            raise ConfigError(f"{key} = {getattr(config, key)} must be even: half of it are sines, half cosines.")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def _is_float(annotation: Any) -> bool:
    return (typing.get_args(annotation) or (annotation,))[0] is float


def _matches(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _matches(value, args[0]) and value in args[1]
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple) or not 1 <= len(value) <= _MAX_ENTRIES:
            return False
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(kinds) == len(value) and all(map(_matches, value, kinds))
    if annotation is None or annotation is types.NoneType:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        low, high = args[1].low, args[1].high
        return f"only {low}" if low == high else f"{_describe(args[0])} from {low} to {high}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "only " + " or ".join(repr(arg) for arg in args)
    if origin is tuple:
        length = f"1 to {_MAX_ENTRIES}" if args[-1] is Ellipsis else str(len(args))
        return f"a list of {length} ({_describe(args[0])})"
    if annotation is None or annotation is types.NoneType:
        return "null"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[annotation]
