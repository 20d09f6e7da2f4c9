"""The help of a command: the flags that matter on one screen, and all of them by topic.

The flags are read by tyro, whose own help is one list: more than a hundred flags for a training script. Here argparse
prints them, in groups.
"""

import argparse
import dataclasses
import inspect
import itertools
import shutil
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from codi_jax.cli.flags import Flags, Scope, Topic

ALL = "all"
_FEW = 16  # flags that fit on a screen with their help
_WIDEST = 120
_KINDS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Flag(NamedTuple):
    """A flag, as help and completion show it.

    Attributes:
      field: the name of its field.
      names: the ways to write it, the first one preferred; for a switch, the last one switches it off.
      values: what follows it: "INT", "{a,b}", "TEXT ...", or nothing for a switch.
      choices: the values to choose from, if there are some.
      text: its help.
      default: its default, or that it is required; nothing where that says nothing.
      is_required: whether it has to be given.
      topic: what it is about.
    """

    field: str
    names: tuple[str, ...]
    values: str
    choices: tuple[str, ...]
    text: str
    default: str
    is_required: bool
    topic: Topic


def flags_of(args_class: type) -> list[Flag]:
    """The flags of a dataclass."""
    hints = get_type_hints(args_class, include_extras=True)
    texts, topics = _texts(args_class), _topics(args_class)
    return [
        _flag(field, hints[field.name], texts.get(field.name, ""), topics[field.name])
        for field in dataclasses.fields(args_class)
    ]


def show(args_class: type, prog: str, topic: str = "") -> str:
    """The help of a command.

    Args:
      args_class: the dataclass of its flags.
      prog: the program's name.
      topic: the topic to explain the flags of, or "all"; by default those that matter, and the names of the others.

    Raises:
      ValueError: if the command has no flags of this topic.
    """
    flags = flags_of(args_class)
    by_topic = {each: [flag for flag in flags if flag.topic is each] for each in Topic}
    by_topic = {each: found for each, found in by_topic.items() if found}
    if topic not in ("", ALL, *by_topic):
        raise ValueError(f"--help {topic} is not possible: use one of {', '.join([ALL, *by_topic])}.")
    essential = _essential(args_class, flags)
    parser = _printer(args_class, prog)
    if topic in by_topic:
        _add(parser, topic, by_topic[Topic(topic)])
    elif topic == ALL or not essential or len(by_topic) == 1:
        if essential:
            _add(parser, "the flags that matter", essential)
        for each, found in by_topic.items():
            _add(parser, each if len(by_topic) > 1 else "flags", [flag for flag in found if flag not in essential])
    else:
        _add(parser, "the flags that matter", [flag._replace(text=_first_sentence(flag.text)) for flag in essential])
        parser.epilog = _names(by_topic, essential)
    return parser.format_help()


def completion_parser(args_class: type, parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a dataclass to a parser, from which tab completion is made."""
    for flag in flags_of(args_class):
        _add_flag(parser, flag)


def _printer(args_class: type, prog: str) -> argparse.ArgumentParser:
    width = min(shutil.get_terminal_size().columns, _WIDEST)

    class Formatter(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=8, width=width)

        def _format_action_invocation(self, action: argparse.Action) -> str:
            """All names once, then what follows them."""
            values = [] if action.metavar is None else [str(action.metavar)]
            return " ".join([", ".join(action.option_strings) or action.dest, *values])

    description = "\n\n".join(
        textwrap.fill(" ".join(part.split()), width) for part in (inspect.getdoc(args_class) or "").split("\n\n")
    )
    return argparse.ArgumentParser(
        prog, "%(prog)s [--config FILE] [--FLAG VALUE ...]", description, formatter_class=Formatter, add_help=False
    )


def _add(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    group = parser.add_argument_group(title)
    for flag in flags:
        _add_flag(group, flag)


def _add_flag(group: Any, flag: Flag) -> None:
    text = f"{flag.text} {flag.default and f'({flag.default})'}".strip().replace("%", "%%")
    if not flag.values:
        group.add_argument(*flag.names, help=text, action="store_true")
    else:
        group.add_argument(*flag.names, help=text, metavar=flag.values, choices=flag.choices or None)


def _names(by_topic: Mapping[Topic, Sequence[Flag]], essential: Sequence[Flag]) -> str:
    """The names of the flags, by topic, and how to see more."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    indent = max(map(len, by_topic)) + 4
    lines = ["all others, by topic:"]
    for topic, flags in by_topic.items():
        names = " ".join(flag.names[0] for flag in flags if flag not in essential)
        first = f"  {topic}".ljust(indent)
        lines += textwrap.wrap(
            names, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
        )
    lines += ["", f"--help {ALL} explains all flags, --help {next(iter(by_topic))} those of a topic. --config FILE"]
    lines[-1] += (
        " reads flags from a YAML file,\nsuch as the config.yaml that a run writes; the command line has the last word."
    )
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    sentence, point, _ = text.partition(". ")
    return sentence + point.strip()


def _essential(args_class: type, flags: Sequence[Flag]) -> list[Flag]:
    """Those that a class names, and those that have to be given; none if a screen has room for all."""
    if len(flags) <= _FEW:
        return []
    named = tuple(args_class.essential if issubclass(args_class, Flags) else ())
    by_name = {flag.field: flag for flag in flags}
    required = [flag.field for flag in flags if flag.is_required and flag.field not in named]
    return [by_name[name] for name in (*required, *named) if name in by_name]


def _texts(args_class: type) -> dict[str, str]:
    """What the docstrings of the fields say, those of subclasses first."""
    texts = {}
    for base in reversed(args_class.__mro__):
        if dataclasses.is_dataclass(base):
            found = docstring_parser.parse_from_object(base).params
            texts |= {each.arg_name: " ".join((each.description or "").split()) for each in found}
    return texts


def _topics(args_class: type) -> dict[str, Topic]:
    """A flag belongs to the topic of its annotation, or else of the class that declared it first."""
    topics: dict[str, Topic] = {}
    for base in reversed(args_class.__mro__):
        topic: Topic = vars(base).get("topic") or Topic.METHOD
        for name, annotation in inspect.get_annotations(base, eval_str=True).items():
            marks = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Topic)]
            topics[name] = marks[-1] if marks else topics.get(name, topic)
    return topics


def _flag(field: dataclasses.Field, annotation: Any, text: str, topic: Topic) -> Flag:
    marks = [mark for mark in _marks(annotation) if not isinstance(mark, Scope | Topic)]
    preferred = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
    aliases = itertools.chain.from_iterable(getattr(mark, "aliases", None) or () for mark in marks)
    names = tuple(dict.fromkeys([f"--{preferred}", *aliases]))
    if tyro.conf.Positional in marks:
        names = (preferred,)
    kind = _bare(annotation)
    if kind is bool:
        names, values, choices = (*names, f"--no_{preferred}"), "", ()
    else:
        given = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
        values = given or _values(kind)
        choices = tuple(values.strip("{}").split(",")) if values.startswith("{") and " " not in values else ()
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    is_required = default is dataclasses.MISSING
    return Flag(
        field.name, names, values, choices, text, "required" if is_required else _shown(default), is_required, topic
    )


def _shown(default: Any) -> str:
    if default is None or default is False or default in ((), ""):
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "on" if default is True else default
    return f"default: {shown}"


def _marks(annotation: Any) -> Iterable[Any]:
    """What annotates a type, the outermost last."""
    for part in get_args(annotation)[:1] if hasattr(annotation, "__metadata__") else ():
        yield from _marks(part)
    yield from getattr(annotation, "__metadata__", ())


def _bare(annotation: Any) -> Any:
    """A type without annotations and without None."""
    if hasattr(annotation, "__metadata__"):
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _bare(kinds[0]) if len(kinds) == 1 else kinds[-1] if float not in kinds else float
    return annotation


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return (
            f"{_values(_bare(parts[0]))} ..." if parts[-1] is ... else " ".join(_values(_bare(part)) for part in parts)
        )
    return _KINDS.get(kind, "VALUE")
