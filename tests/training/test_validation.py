"""What a run shows while it trains."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_folders import numbered, write_folder

from codi_jax.data import ConditionOf
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.networks import Networks
from codi_jax.training.flags import RunFlags
from codi_jax.training.validation import Samples, generate_with, held_out, validation_samples

COUNT = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    conditions: ConditionOf = None

    @property
    def condition(self) -> ConditionOf:
        return self.conditions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "train", COUNT, size=(48, 32), condition_size=(48, 32))


def flags_of(data: Path, **flags: Any) -> Flags:
    return Flags(train_data_dir=str(data), resolution=32, **flags)


def numbers(samples: Samples) -> list[int]:
    """Which pictures these are; their captions say so, too."""
    assert samples.pictures is not None
    assert samples.prompts == [str(number) for number in samples.pictures[:, 0, 0, 0]]
    return [int(prompt) for prompt in samples.prompts]


def test_samples_are_the_same_in_every_run_and_not_augmented(data: Path):
    flags = flags_of(data, random_flip=True, proportion_empty_prompts=1.0, num_validation_images=4, conditions="column")
    shown = [validation_samples(flags) for _ in range(3)]
    assert len({tuple(numbers(samples)) for samples in shown}) == 1
    assert len(set(numbers(shown[0]))) == 4
    for number, pixels, condition in zip(numbers(shown[0]), shown[0].pictures, shown[0].conditions, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(numbered(number, (48, 32)).crop((8, 0, 40, 32))))
        np.testing.assert_array_equal(pixels, condition)


def test_how_many_does_not_change_which_come_first(data: Path):
    few, many = (held_out(flags_of(data), count) for count in (2, 5))
    assert numbers(few) == numbers(many)[:2]
    assert few.conditions is None


def test_a_small_data_set_is_shown_whole(data: Path):
    samples = held_out(flags_of(data), 128)
    assert sorted(numbers(samples)) == list(range(COUNT))


def test_data_without_captions(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        numbered(i).save(folder / f"{i}.png")
    samples = held_out(flags_of(folder, cache_dir=str(tmp_path / "cache")), 8, has_text=False)
    assert samples.pictures is not None
    assert sorted(samples.pictures[:, 0, 0, 0]) == [0, 1, 2]
    assert samples.prompts == [""] * 3


def test_samples_of_a_folder_that_is_not_trained_on(data: Path, tmp_path: Path):
    others = write_folder(tmp_path / "others", 3, captions=["100", "101", "102"])
    flags = flags_of(data, validation_data_dir=str(others), max_train_samples=1)
    assert sorted(validation_samples(flags).prompts) == ["100", "101", "102"]


def test_a_data_set_that_is_cached_or_read_by_processes(data: Path):
    samples = held_out(flags_of(data, cache_latents=True, dataloader_num_workers=2), 2)
    assert len(numbers(samples)) == 2


def test_a_stream(data: Path):
    """Of unknown length: where it is short, samples come again."""
    assert len(numbers(held_out(flags_of(data, streaming=True), 8))) == 8


def test_prompts_of_ones_own(data: Path, tmp_path: Path):
    file = tmp_path / "condition.png"
    numbered(7, (64, 64)).save(file)
    flags = flags_of(
        data, validation_prompt=("a", "b"), validation_image=(str(file),), num_validation_images=1, conditions="column"
    )
    samples = validation_samples(flags)
    assert samples.prompts == ["a", "b"]
    assert samples.pictures is None
    assert samples.conditions is not None
    assert samples.conditions.shape == (2, 32, 32, 3)
    assert np.all(samples.conditions[..., 0] == 7)
    assert validation_samples(flags_of(data, validation_prompt=("a",), num_validation_images=1)) == Samples(["a"], 32)


def pairs_of_diffusers(images: list[int], prompts: list[str], count: int) -> list[tuple[str, int]]:
    """The pictures of ``log_validation`` in diffusers' train_controlnet.py, in their order."""
    if len(images) == len(prompts):
        pass
    elif len(images) == 1:
        images = images * len(prompts)
    elif len(prompts) == 1:
        prompts = prompts * len(images)
    else:
        raise ValueError
    return [pair for pair in zip(prompts, images, strict=True) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("images", "prompts"), [("1", "a"), ("123", "abc"), ("1", "abc"), ("123", "a")])
def test_prompts_and_images_make_the_pairs_of_diffusers(
    data: Path, tmp_path: Path, images: str, prompts: str, count: int
):
    for number in map(int, images):
        numbered(number, (64, 64)).save(tmp_path / f"{number}.png")
    files = tuple(str(tmp_path / f"{number}.png") for number in images)
    flags = flags_of(
        data, validation_prompt=tuple(prompts), validation_image=files, num_validation_images=count, conditions="column"
    )
    flags.check()
    samples = validation_samples(flags)
    assert samples.conditions is not None
    shown = [*zip(samples.prompts, samples.conditions[:, 0, 0, 0].tolist(), strict=True)]
    assert shown == pairs_of_diffusers([*map(int, images)], [*prompts], count)


def test_each_prompt_is_shown_as_often_as_asked_for(data: Path):
    flags = flags_of(data, validation_prompt=("a", "b"), num_validation_images=2)
    assert validation_samples(flags) == Samples(["a", "a", "b", "b"], 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_validation_images": 0}, "--num_validation_images 0 is not possible: it must be at least 1"),
        (
            {"validation_prompt": ("a", "b", "c"), "validation_image": ("x", "y")},
            "--validation_image has 2 images and --validation_prompt 3 prompts: give one of either, or as many images",
        ),
        ({"validation_image": ("x",)}, "--validation_image needs --validation_prompt: give one, such as"),
        ({"validation_image": ("x", "y")}, "--validation_image needs --validation_prompt: give one, such as"),
        (
            {"validation_prompt": ("a",), "validation_data_dir": "d"},
            "--validation_prompt and --validation_data_dir exclude each other",
        ),
    ],
)
def test_flags_that_make_no_sense(data: Path, flags: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        flags_of(data, **flags).check()


def test_prompts_need_the_condition_images_of_the_task(data: Path):
    with pytest.raises(ValueError, match="--validation_prompt needs --validation_image here"):
        validation_samples(flags_of(data, validation_prompt=("a",), conditions="column"))


def test_images_are_not_put_aside_silently(data: Path):
    flags = flags_of(data, validation_prompt=("a",), validation_image=("x.png",))
    with pytest.raises(ValueError, match="--validation_image has no place here: this training has no condition images"):
        validation_samples(flags)


def test_a_missing_folder_is_named_by_its_flag(data: Path):
    with pytest.raises(ValueError, match=r"there is no folder /nowhere: check --validation_data_dir"):
        validation_samples(flags_of(data, validation_data_dir="/nowhere"))


def test_the_data_to_train_on_is_looked_for_even_where_other_samples_are_shown(data: Path):
    """What comes next is to load the model."""
    for shown in ({"validation_data_dir": str(data)}, {"validation_prompt": ("a",)}):
        with pytest.raises(ValueError, match=r"there is no folder /nowhere: check --train_data_dir"):
            flags_of(Path("/nowhere"), **shown).check()


class Recorder(Model):
    """Notes what it is called with."""

    task = "text-to-image"

    def __call__(self, prompts: list[str], **options: Any) -> np.ndarray:
        CALLS.append((self.params, prompts, options))
        if prompts == ["nan"]:
            raise FloatingPointError
        return np.zeros((len(prompts), 4, 4, 3), np.uint8)


class Editor(Recorder):
    task = "edit"


CALLS: list[tuple[Any, ...]] = []
OLD, NEW = {"kernel": "old"}, {"kernel": "new"}


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    CALLS.clear()
    return CALLS


def model_of(kind: type[Recorder], controlnet: Any = None) -> Recorder:
    networks = Networks(None, controlnet=controlnet)
    return kind(networks=networks, params={"unet": OLD, "vae": OLD}, schedule=None, tokenizers={})


def test_generating_leaves_the_parameters_as_they_are(calls: list[tuple[Any, ...]]) -> None:
    model, samples = model_of(Recorder), Samples(["a"], 16, conditions=np.zeros((1, 16, 16, 3), np.uint8))
    before = model.params
    generate_with.__wrapped__(model, {"unet": NEW}, samples, steps=3)
    with pytest.raises(FloatingPointError):
        generate_with.__wrapped__(model, {"unet": NEW}, Samples(["nan"], 16))
    assert model.params is before
    assert before == {"unet": OLD, "vae": OLD}
    params, prompts, options = calls[0]
    assert params == {"unet": NEW, "vae": OLD}
    assert prompts == ["a"]
    # A model without a ControlNet refuses conditions; the size is then that of nothing else.
    assert options == {"steps": 3, "height": 16, "width": 16}
    calls.clear()
    generate_with.__wrapped__(model_of(Recorder, controlnet="one"), {}, samples)
    assert calls[0][2]["control_image"] is samples.conditions
    generate_with.__wrapped__(model_of(Editor), {}, samples)
    assert calls[1][2]["image"] is samples.conditions


def test_many_samples_are_made_in_batches_of_one_size(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise that they would have in one batch: image i of a call is that of seed + i."""

    def made(self: Recorder, prompts: list[str], *, seed: int = 0, **options: Any) -> np.ndarray:
        calls.append((self.params, prompts, options))
        rows = zip(prompts, options["control_image"][:, 0, 0, 0], strict=True)
        return np.stack([np.full((4, 4, 3), (int(p), c, seed + i), np.uint8) for i, (p, c) in enumerate(rows)])

    monkeypatch.setattr(Recorder, "__call__", made)
    conditions = np.repeat(np.arange(100, 119, dtype=np.uint8), 16 * 16 * 3).reshape(19, 16, 16, 3)
    samples = Samples([str(i) for i in range(19)], 16, conditions=conditions)
    pictures = generate_with.__wrapped__(model_of(Recorder, controlnet="one"), {}, samples)
    assert pictures[:, 0, 0].tolist() == [[i, 100 + i, i] for i in range(19)]
    assert [len(prompts) for _, prompts, _ in calls] == [7, 7, 7]
