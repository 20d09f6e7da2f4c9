"""Small data sets of pictures whose content says which they are."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def numbered(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture (width, height) whose red channel is its number, with gradients in green (x) and blue (y)."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = number
    pixels[..., 1] = np.linspace(0, 255, width).round()[None, :]
    pixels[..., 2] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def write_folder(
    folder: Path,
    count: int,
    *,
    size: tuple[int, int] = (32, 32),
    condition_size: tuple[int, int] | None = None,
    name: str = "meta.jsonl",
    captions: list | None = None,
) -> Path:
    """The layout of the original's preprocessing: images, processed_images and meta.jsonl. Captions are numbers."""
    (folder / "images").mkdir(parents=True)
    (folder / "processed_images").mkdir()
    with (folder / name).open("w") as lines:
        for i in range(count):
            row = {"image": f"images/{i}.png", "text": captions[i] if captions else str(i)}
            numbered(i, size).save(folder / row["image"])
            if condition_size is not None:
                row["conditioning_image"] = f"processed_images/{i}.png"
                numbered(i, condition_size).save(folder / row["conditioning_image"])
            lines.write(json.dumps(row) + "\n")
    return folder


def write_edits(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Pictures before and after an edit, which are the same, and instructions, which are numbers."""
    write_folder(folder, count, size=size, condition_size=size)
    names = {"conditioning_image": "input_image", "image": "edited_image", "text": "edit_prompt"}
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    renamed = [{names[column]: value for column, value in row.items()} for row in rows]
    (folder / "meta.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in renamed))
    return folder


def count_tokens(texts: list[str]) -> dict[str, np.ndarray]:
    """A tokenizer for captions that are numbers, after an n or not; the empty one is -1."""
    return {"text_encoder": np.array([[int(text.removeprefix("n")) if text else -1] for text in texts])}
