"""Makes triples of an image, an instruction and the edited image, for InstructPix2Pix.

# of pairs in a table; the instruction is a column of it, or made from its columns
python3 dataset_tools/make_edit_dataset.py --input pairs.parquet --input_image_column before \
        --edited_image_column after --instruction "make it {season}" --train_data_dir data/edits

# of two folders with images of the same names
python3 dataset_tools/make_edit_dataset.py --before_dir photos --after_dir drawings \
        --instruction "turn it into a pencil drawing" --train_data_dir data/edits

# drawn by a text-to-image model from captions and instructions (columns input, edit, output), by prompt-to-prompt
python3 dataset_tools/make_edit_dataset.py --input prompts.jsonl --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --clip_model openai/clip-vit-large-patch14 --train_data_dir data/edits
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from codi_jax.cli import command_line
from codi_jax.data.files import Folder
from codi_jax.data.preparation.edits import AFTER, BEFORE, Edit, Generate, GenerateFlags, fields_of, pairs_of_folders
from codi_jax.data.preparation.job import JobFlags, describe, make_data_set
from codi_jax.data.preparation.pictures import PictureFlags
from codi_jax.data.preparation.rows import InputRow, Skipped
from codi_jax.data.preparation.tables import TableColumns, TableFlags, find_column, id_column, open_table

_SHARD_SIZE, _GENERATED = 1000, 4


@dataclass(frozen=True, kw_only=True)
class Args(JobFlags, GenerateFlags, PictureFlags, TableFlags):
    """Makes triples of an image, an instruction and the edited image."""

    input_image_column: str = BEFORE
    """Column of the images before the edit, in the table of --input."""
    edited_image_column: str = AFTER
    """Column of the images after the edit."""
    are_urls: bool = False
    """The image columns hold addresses to download from."""
    before_dir: str | None = None
    """Folder of images before the edit, instead of a table."""
    after_dir: str | None = None
    """Folder of images after the edit, with the same names."""
    instruction: str | None = None
    """Template of the instruction, with columns of the table in braces, such as "make it {season}", or for two folders
    with {name}, {folder} and {instruction}, which comes from --instructions. Default: the column edit_prompt, or
    --instructions."""
    instructions: str | None = None
    """Table of instructions for two folders, with the columns file_name and instruction."""
    num_proc: int | None = None
    """Number of processes. Default: one per core, or a single one with --teacher."""
    shard_size: int | None = None  # type: ignore[assignment]
    """Rows of the input per task, which is the most that is lost when a process is killed. Default: 1000, or 4 with
    --teacher."""

    def check(self) -> None:
        super().check()
        folders = self.before_dir is not None, self.after_dir is not None
        if folders[0] != folders[1]:
            raise ValueError("--before_dir and --after_dir need each other.")
        if (self.input is None) == (self.before_dir is None):
            raise ValueError("give either --input, a table, or --before_dir and --after_dir.")
        if self.teacher and self.before_dir:
            raise ValueError("--teacher draws both images: it needs --input, a table of captions, and no folders.")
        if self.instructions is not None and self.before_dir is None:
            raise ValueError("--instructions is for --before_dir and --after_dir; of a table name the columns.")

    @property
    def template(self) -> str:
        """The template of the instruction."""
        return self.instruction or ("{edit_prompt}" if self.before_dir is None else "{instruction}")


def pair_columns(args: Args, names: Sequence[str], where: str) -> TableColumns:
    before = BEFORE, find_column(args.input_image_column, (), names, where, "--input_image_column")
    after = AFTER, find_column(args.edited_image_column, (), names, where, "--edited_image_column")
    texts = text_columns(fields_of(args.template), names, where, "--instruction")
    return TableColumns((before, after), texts, id_column(args, names, where), args.are_urls)


def text_columns(wanted: Sequence[str], names: Sequence[str], where: str, flag: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, find_column(name, (), names, where, flag)) for name in wanted)


def prompt_columns(args: Args, names: Sequence[str], where: str) -> TableColumns:
    texts = text_columns(("input", "edit", "output"), names, where, "--input")
    return TableColumns((), texts, id_column(args, names, where), False)


def items_of_folders(args: Args) -> tuple[Callable[[], Iterable[InputRow | Skipped]], str]:
    found: dict[str, str] = {}
    if args.instructions is not None:
        table = replace(args, input=args.instructions)
        columns = functools.partial(_instruction_columns, table)
        rows = open_table(table, columns)[0]()
        found = {row.texts["file_name"]: row.texts["instruction"] for row in rows if isinstance(row, InputRow)}
    allowed = ["folder", "name", *(["instruction"] if args.instructions is not None else [])]
    if unknown := sorted(set(fields_of(args.template)) - set(allowed)):
        if args.instruction is None:
            raise ValueError("give --instruction, one for all pairs, or --instructions, a table of them.")
        raise ValueError(f"--instruction has {{{unknown[0]}}}, but of two folders there are only {', '.join(allowed)}.")
    folders = []
    for flag, path in (("before_dir", args.before_dir), ("after_dir", args.after_dir)):
        folders.append(Folder(path or ""))
        if not folders[-1].is_dir():
            raise ValueError(f"there is no folder {path}: check --{flag}.")
    return functools.partial(pairs_of_folders, *folders, found), f"{args.before_dir} and {args.after_dir}"


def _instruction_columns(args: Args, names: Sequence[str], where: str) -> TableColumns:
    texts = text_columns(("file_name", "instruction"), names, where, "--instructions")
    return TableColumns((), texts, None, False)


def main(args: Args) -> None:
    args.check()
    size = _GENERATED if args.teacher else _SHARD_SIZE
    processes = 1 if args.teacher and args.engine == "datasets" else None
    args = replace(args, shard_size=args.shard_size or size, num_proc=args.num_proc or processes)
    pictures = PictureFlags.of(args)
    prepare: Any = Edit(pictures, args.template)
    if args.teacher:
        prepare = Generate(GenerateFlags.of(args), pictures, args.seed)
        items, line = open_table(args, functools.partial(prompt_columns, args))
    elif args.before_dir is not None:
        items, line = items_of_folders(args)
    else:
        items, line = open_table(args, functools.partial(pair_columns, args))
    print(f"reading {line}")
    print(describe(make_data_set(args, items, prepare, {name: getattr(args, name) for name in _MADE_WITH}), args))


# The flags that a resumed run must share with the stopped one.
_MADE_WITH = (
    *PictureFlags.names(), *GenerateFlags.names(),
    *sorted({*TableFlags.names()} - {"cache_dir", "allow_outside_paths"}), "input_image_column", "edited_image_column",
    "before_dir", "after_dir", "instruction", "instructions",
)  # fmt: skip

if __name__ == "__main__":
    command_line.run(Args, main)
