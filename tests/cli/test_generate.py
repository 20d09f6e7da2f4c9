"""The command line, as a user runs it: ``python3 -m codi_jax.generate``."""

import functools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from folders import SIZE, XL_UNET, refuse_weights, saved_pipeline
from PIL import Image

from codi_jax import generate
from codi_jax.io.lora_files import save_lora
from codi_jax.models.lora import init_lora
from codi_jax.models.unet import UNet2DCondition
from codi_jax.models.unet_config import UNetConfig

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a family's model, made once."""
    return functools.partial(saved_pipeline, scratch=tmp_path_factory.mktemp("models"))


def command_line(folder: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs it; on a slow machine it says that it is still at work, which is left out here."""
    command = [sys.executable, "-m", "codi_jax.generate", *map(str, flags)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    ran.stderr = re.sub(r"^.*: \d+ s so far\n", "", ran.stderr, flags=re.MULTILINE)
    return ran


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_text_to_image(models: Models, tmp_path: Path) -> None:
    flags = ["--model", models("text-to-image"), "--prompt", "a red cat", "--steps", "2", "--seed", "7"]
    flags += ["--num_images", "3", "--batch_size", "2", "--output"]
    ran = command_line(tmp_path, *flags, "new/cat.png")
    assert (ran.returncode, ran.stderr) == (0, "")
    speed, wrote = ran.stdout.splitlines()
    assert re.fullmatch(r"\d+\.\d\d seconds per image \(4 in \d+\.\d s on cpu\), after \d+\.\d s of compilation", speed)
    names = ["cat.png", "cat_0.png", "cat_1.png", "cat_2.png"]
    assert wrote == "wrote " + ", ".join(f"new/{name}" for name in names)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    whole, *single = [read(tmp_path / "new" / name) for name in names]
    assert whole.shape == (2 * SIZE, 2 * SIZE, 3)
    np.testing.assert_array_equal(whole[SIZE:, :SIZE], single[2])
    assert all(image.shape == (SIZE, SIZE, 3) and image.std() > 10 for image in single)
    assert min(np.abs(single[i] - single[j]).mean() for i, j in [(0, 1), (0, 2), (1, 2)]) > 10
    # The same again is the same, to the byte.
    assert command_line(tmp_path, *flags, "again.png").returncode == 0
    for name in names:
        again = tmp_path / name.replace("cat", "again")
        assert again.read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.slow
def test_controlnet_and_a_long_prompt(models: Models, tmp_path: Path) -> None:
    Image.new("L", (24, 40), 200).save(tmp_path / "edges.png")
    flags = [
        "--model",
        models("text-to-image"),
        "--controlnet",
        models("controlnet"),
        "--prompt",
        " ".join("abcdefghijklmnopqrst"),
    ]
    ran = command_line(tmp_path, *flags, "--control_image", "edges.png", "--steps", "1", "--sampler", "lcm")
    assert ran.returncode == 0
    assert re.fullmatch(r"warning: The prompt 'a b .* tokens .* This was cut off: 'o p q r s t'\.\n", ran.stderr)
    assert read(tmp_path / "out.png").shape == (40, 24, 3)


@pytest.mark.slow
def test_edit(models: Models, tmp_path: Path) -> None:
    Image.new("RGBA", (35, 33), (200, 30, 30, 255)).save(tmp_path / "photo.png")
    flags = ["--model", models("instruct-pix2pix"), "--prompt=make it blue", "--image=photo.png"]
    ran = command_line(
        tmp_path, *flags, "--image_guidance_scale=1", "--guidance_scale=3", "--steps=2", "--output=edited.jpg"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert read(tmp_path / "edited.jpg").shape == (32, 32, 3)  # the largest multiple of 4 in the photo's size


def test_help_names_the_flags(tmp_path: Path) -> None:
    ran = command_line(tmp_path, "--help", "all")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("usage: python3 -m codi_jax.generate")
    flags = set(re.findall(r"--\w+", ran.stdout))
    assert flags >= {
        "--model", "--prompt", "--output", "--negative_prompt", "--image", "--mask_image", "--control_image",
        "--controlnet", "--lora", "--lora_scale", "--steps", "--guidance_scale", "--image_guidance_scale", "--sampler",
        "--timesteps", "--seed", "--num_images", "--batch_size", "--height", "--width", "--dtype", "--attention",
    }  # fmt: skip
    assert not re.search(r"--\w+-", ran.stdout), "flags have underscores"
    for word in ("(required)", "dpm-solver++", "bfloat16", "InstructPix2Pix", "Hugging Face Hub"):
        assert word in ran.stdout


@pytest.fixture(scope="module")
def lora_of_another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = UNet2DCondition(UNetConfig.from_dict(XL_UNET)).abstract_params()
    path = tmp_path_factory.mktemp("another") / "lora.safetensors"
    save_lora(path, {"unet": init_lora(jax.random.key(0), params, rank=2, target_modules=["to_q"])})
    return path


def test_bad_input_is_one_sentence(models: Models, tmp_path: Path) -> None:
    """Without a traceback, and nothing is written."""
    ran = command_line(tmp_path, "--prompt", "a cat", "--model", models("text-to-image"), "--image", "nothing.png")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "error: There is no image nothing.png.\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "runs/3/final"], "error: There is no folder runs/3/final, and it is not an id such as owner/name"),
        (["--output", "out.txt"], r"error: out\.txt needs the extension of an image file: use one of \.png, "),
        (["--output", "file/out.png"], r"error: file/out\.png cannot be written: .*/file is not a folder"),
        (["--num_images", "0"], "error: --num_images and --batch_size must be at least 1"),
        (["--steps", "0"], "error: steps = 0: choose 1 to 1000"),
        (["--timesteps", "5", "9", "--sampler", "lcm"], r"error: timesteps = \[5, 9\]: they must descend"),
        (["--mask_image", "file.png"], "error: mask_image is where to paint in an image: give that image, too"),
        (["--strength", "2"], "error: --strength 2.0 is not possible: it must be between 0 and 1"),
        (["--strength", "0.5"], "error: strength says how much of an image to change"),
        (["--control_image", "file.png"], "error: control_image needs a ControlNet"),
        (["--height", "30"], "error: height = 30, width = 32: this model makes images whose sides are multiples of 4"),
        (["--sampler", "codi"], "error: .*codi"),
        (["--sampler", "ddim", "--timesteps", "9", "5"], "error: the sampler ddim takes even steps only"),
        (["--steps", "1001"], "error: steps = 1001: choose 1 to 1000"),
        (["--controlnet", "CONTROLNET"], "error: the pipeline has a ControlNet: give it a control_image"),
        (["--height", "100000000"], "error: --height 100000000 is not possible: it must be between 1 and 16384"),
        (["--textual_inversion", "no.safetensors:<toy>"], r"error: There is no weight file no\.safetensors"),
        (["--lora", "nothing.safetensors"], r"error: There is no weight file nothing\.safetensors"),
        (["--lora", "OTHER"], r"error: .*lora\.safetensors.*is a LoRA for another model"),
        (["--seed", str(2**63)], "error: --seed 9223372036854775808 is not possible"),
        (["--guidance_scale", "nan"], "error: --guidance_scale nan is not possible: it must be a finite number"),
        (["--unet", "student.safetensors"], "error: There is no weight file student.safetensors"),
        (["--scheduler_config", "karras"], "error: --scheduler_config karras is not possible: write key=value, as in"),
        (["--scheduler_config", "use_lu_lambdas=true", "--sampler=euler"], "does not support use_lu_lambdas = True"),
        (["--guidance_rescale", "2"], "error: --guidance_rescale 2.0 is not possible"),
        (["--output", "/proc/self/out.png"], r"error: /proc/self/out\.png cannot be written"),
    ],
)
def test_every_kind_of_bad_input(
    models: Models,
    lora_of_another_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    """Found before weights are read: with large models that takes minutes."""
    refuse_weights(monkeypatch)
    stand_for = {"CONTROLNET": models("controlnet") / "controlnet", "OTHER": lora_of_another_model}
    flags = [str(stand_for.get(flag, flag)) for flag in flags]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    Image.new("RGB", (8, 8)).save("file.png")
    model = str(models("text-to-image"))
    monkeypatch.setattr(sys, "argv", ["generate", "--prompt", "a cat", "--model", model, *flags])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets it
    with pytest.raises(SystemExit, match=message) as ended:
        generate.main()
    assert "\n" not in str(ended.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "file.png"}


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: generate.Args) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(generate, "run", run)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", ["generate", "--model", "m", "--prompt", "p"])
    with pytest.raises(SystemExit, match="error: the device has run out of memory: try a smaller --batch_size"):
        generate.main()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.7", ("style.safetensors", 0.7)),
        ("owner/name/of/sd15.safetensors:-1", ("owner/name/of/sd15.safetensors", -1.0)),
        ("folder:v2", ("folder:v2", 1.0)),
        (":0.5", (":0.5", 1.0)),
    ],
)
def test_each_lora_may_have_a_scale_of_its_own(text, expected):
    assert generate._with_scale(text) == expected


def test_entries_of_the_scheduler_are_read_as_json_or_text():
    texts = ["timestep_spacing=trailing", "use_karras_sigmas=true", "steps_offset=0", "beta_start=0.1", "a=b=c"]
    assert generate._entries(texts) == {
        "timestep_spacing": "trailing", "use_karras_sigmas": True, "steps_offset": 0, "beta_start": 0.1, "a": "b=c",
    }  # fmt: skip
