"""Weight deltas against the original's PyTorch function, on real state dicts, and the script that applies them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from folders import SD_UNET, SIZE, XL_UNET, saved_pipeline
from oracle import make_torch
from peak_memory import PEAK
from picture_folders import numbered
from safetensors.numpy import load_file, save_file

from codi_jax.cli import command_line
from codi_jax.diffusion.sampling_spec import SamplingSpec
from codi_jax.diffusion.schedule import NoiseSchedule
from codi_jax.diffusion.timesteps import timesteps_for
from codi_jax.methods import weight_delta
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.saving import save_schedule
from codi_jax.training.jobs import adaptation
from training_scripts import adapt_instruct_pix2pix as script

WEIGHT = 0.37


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An editor, the model it comes from and that model distilled; the latter as a UNet alone, as LCM-XL is."""
    scratch = tmp_path_factory.mktemp("models")
    saved_pipeline("instruct-pix2pix", scratch)
    saved_pipeline("text-to-image", scratch)
    student = make_torch("unet", {**SD_UNET, "time_cond_proj_dim": 16}, 9)
    student.save_pretrained(scratch / "student")
    return scratch


def unet_of(path: Path) -> dict[str, np.ndarray]:
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def original(editor: dict[str, np.ndarray], base: Any, distilled: Any) -> dict[str, np.ndarray]:
    """The seed's ``adapt``, in PyTorch."""
    adapted = {}
    for name, param in editor.items():
        param = torch.from_numpy(param.copy())
        if name != "conv_in.weight":
            delta = torch.from_numpy(distilled[name]) - torch.from_numpy(base[name])
            param = param + WEIGHT * delta
        adapted[name] = param.numpy()
    return adapted


def run(folder: Path, output: Path, *words: str) -> Path:
    args = ["--pretrained_model_name_or_path", str(folder / "instruct-pix2pix"), "--output_dir", str(output), *words]
    script.main(parse(args))
    return output


def parse(words: list[str]) -> script.Args:
    import tyro

    return tyro.cli(script.Args, args=words, use_underscores=True, config=(tyro.conf.DisallowNone,))


def of_models(folder: Path) -> list[str]:
    return ["--base_model", str(folder / "text-to-image"), "--distilled_model", str(folder / "student")]


def test_it_is_the_function_of_the_original(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path / "out", *of_models(folder), "--weight", str(WEIGHT))
    editor, base = (unet_of(folder / name / "unet") for name in ("instruct-pix2pix", "text-to-image"))
    wanted, ours = original(editor, base, unet_of(folder / "student")), unet_of(out / "unet")
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    report = json.loads((out / adaptation.REPORT).read_text())
    assert report["weight"] == WEIGHT
    assert report["skipped"] == ["conv_in.weight"]
    assert report["one_sided"] == {"time_embedding.cond_proj.weight": "the distilled model"}
    assert sorted([*report["adapted"], *report["skipped"]]) == sorted(editor)


def test_the_delta_of_the_first_convolution_goes_to_the_channels_that_all_have(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path / "out", *of_models(folder), "--weight", str(WEIGHT), "--conv_in", "add")
    name = "conv_in.weight"
    editor, base = (unet_of(folder / each / "unet")[name] for each in ("instruct-pix2pix", "text-to-image"))
    delta = unet_of(folder / "student")[name] - base
    ours = unet_of(out / "unet")[name]
    np.testing.assert_allclose(ours[:, :4], editor[:, :4] + WEIGHT * delta, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ours[:, 4:], editor[:, 4:])


def test_half_precision_is_subtracted_in_float32() -> None:
    """A difference of two float16 numbers, rounded to float16 before it is weighed, would be another."""
    rng = np.random.default_rng(0)
    editor, base, distilled = (rng.standard_normal(1000).astype("f2") for _ in range(3))
    ours = weight_delta.adapt(editor, base, distilled, WEIGHT)
    wanted = editor.astype("f8") + WEIGHT * (distilled.astype("f8") - base.astype("f8"))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)
    rounded = editor + np.float16(WEIGHT) * (distilled - base)
    assert np.abs(rounded - wanted).max() > 1e-4


def test_the_folder_is_a_whole_model_for_lcm_steps(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path / "out", *of_models(folder))
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(theirs) is diffusers.StableDiffusionInstructPix2PixPipeline
    assert type(theirs.scheduler) is diffusers.LCMScheduler
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    image = numbered(120, (SIZE, SIZE))
    given = {"guidance_scale": 2.0, "image_guidance_scale": 1.0}
    wanted = theirs("a dog", image=image, num_inference_steps=1, latents=latents, output_type="np", **given).images
    made = Model.from_pretrained(out)("a dog", image, steps=1, latents=noise, **given)
    assert np.abs(made - 255 * wanted).max() <= 2


def test_a_distilled_editor_is_sampled_as_what_it_has_become(folder: Path, tmp_path: Path) -> None:
    editor = shutil.copytree(folder / "instruct-pix2pix", tmp_path / "editor")
    save_schedule(NoiseSchedule.from_pretrained(editor).sampled(SamplingSpec.generator([399])), editor)
    words = ["--pretrained_model_name_or_path", str(editor), "--output_dir", str(tmp_path / "out"), *of_models(folder)]
    script.main(parse(words))
    adapted = NoiseSchedule.from_pretrained(tmp_path / "out")
    assert adapted.sampling.timesteps is None
    assert timesteps_for("lcm", adapted, 4).tolist() == [999, 759, 499, 259]


def test_a_lora_is_what_peft_merges(folder: Path, tmp_path: Path) -> None:
    """Convolutions included, and α not the rank."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "instruct-pix2pix", subfolder="unet")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "conv1", "proj_in"])
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    tensors = {f"unet.{name}": value.numpy().copy() for name, value in state.items()}
    metadata = {f"unet.{key}": value for key, value in {"r": 3, "lora_alpha": 5}.items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    out = run(folder, tmp_path / "out", "--lora", str(tmp_path / "lora.safetensors"), "--weight", "1")
    unet.fuse_lora()
    unet.unload_lora()
    wanted, ours = unet.state_dict(), unet_of(out / "unet")
    before = unet_of(folder / "instruct-pix2pix" / "unet")
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name in ours if not np.array_equal(ours[name], before[name])}
    assert changed == {name for name in ours if re.search(r"(to_q|to_out\.0|conv1|proj_in)\.weight", name)}


def test_a_lora_of_the_text_encoder_is_what_diffusers_fuses(folder: Path, tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder / "instruct-pix2pix")
    parts, states = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}, {}
    for (part, model), targets in zip(parts.items(), (["to_q"], ["q_proj", "out_proj"]), strict=True):
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config)
        states[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(model)
    pipe.save_lora_weights(tmp_path, **states, **_collate_lora_metadata(parts), weight_name="lora.safetensors")
    words = ["--lora", str(tmp_path / "lora.safetensors"), "--weight", "0.5", "1"]
    out = run(folder, tmp_path / "out", *words)
    for weight in (0.5, 1):
        fused = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder / "instruct-pix2pix")
        fused.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        fused.fuse_lora(components=["unet", "text_encoder"], lora_scale=weight)
        fused.unload_lora_weights()
        theirs = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(out / f"weight-{weight:g}")
        for part in ("unet", "text_encoder"):
            wanted, ours = getattr(fused, part).state_dict(), getattr(theirs, part).state_dict()
            before = getattr(
                diffusers.DiffusionPipeline.from_pretrained(folder / "instruct-pix2pix"), part
            ).state_dict()
            assert any(not torch.equal(value, before[name]) for name, value in ours.items())
            for name, value in wanted.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_each_model_has_the_variant_that_it_has(folder: Path, tmp_path: Path) -> None:
    """The editor plain and the two others of half precision alone, as the seed's are, with one flag for them all."""
    for name, part in (("text-to-image", "unet"), ("student", ".")):
        model = diffusers.UNet2DConditionModel.from_pretrained(folder / name / part, torch_dtype=torch.float16)
        model.save_pretrained(tmp_path / name / part, variant="fp16")
    (tmp_path / "text-to-image" / "model_index.json").write_bytes(
        (folder / "text-to-image" / "model_index.json").read_bytes()
    )
    with pytest.warns(
        UserWarning, match=r"instruct-pix2pix/unet has no weights of variant 'fp16': reading diffusion_pytorch_mo"
    ):
        out = run(folder, tmp_path / "out", *of_models(tmp_path), "--variant", "fp16", "--weight", str(WEIGHT))
    editor = unet_of(folder / "instruct-pix2pix" / "unet")
    base, student = unet_of(tmp_path / "text-to-image" / "unet"), unet_of(tmp_path / "student")
    wanted = original(editor, *({k: v.astype("f4") for k, v in each.items()} for each in (base, student)))
    for name, value in unet_of(out / "unet").items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_sweep_makes_folders_and_a_picture(folder: Path, tmp_path: Path) -> None:
    numbered(120, (SIZE, SIZE)).save(tmp_path / "image.png")
    show = ["--validation_image", str(tmp_path / "image.png"), "--validation_prompt", "a dog"]
    out = run(folder, tmp_path / "out", *of_models(folder), "--weight", "0.3", "0.5", *show)
    assert {path.name for path in out.iterdir()} == {"weight-0.3", "weight-0.5", "validation.png"}
    first, second = (unet_of(out / name / "unet")["conv_out.weight"] for name in ("weight-0.3", "weight-0.5"))
    base = unet_of(folder / "instruct-pix2pix" / "unet")["conv_out.weight"]
    np.testing.assert_allclose((first - base) / 0.3, (second - base) / 0.5, rtol=1e-3, atol=1e-5)


@pytest.fixture
def refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def refuse(*words: str, model: str = "instruct-pix2pix") -> str:
        given = ["--pretrained_model_name_or_path", str(folder / model), "--output_dir", str(tmp_path / "out"), *words]
        monkeypatch.setattr("sys.argv", ["adapt.py", *given])
        with pytest.raises(SystemExit) as ended:
            command_line.run(script.Args, script.main)
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(ended.value.code)
        return str(ended.value.code)

    return refuse


def test_bad_input_ends_with_a_sentence(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    make_torch("unet", XL_UNET, 1).save_pretrained(tmp_path / "xl")
    base, student = of_models(folder)[:2], of_models(folder)[2:]
    assert "of different families" in refused(*base, "--distilled_model", str(tmp_path / "xl"))
    assert "of different families" in refused("--base_model", str(tmp_path / "xl"), *student)
    assert "its UNet has 4 input channels" in refused(*base, *student, model="text-to-image")
    assert "give either --base_model and --distilled_model, or --lora" in refused(*base)
    assert "go together" in refused(*base, *student, "--validation_prompt", "a")
    assert "There is no image /nowhere.png" in refused(
        *base, *student, "--validation_prompt", "a", "--validation_image", "/nowhere.png"
    )
    save_file({"unet.nothing.lora_A.weight": np.zeros((2, 3), "f4")}, tmp_path / "lora.safetensors")
    assert "lora.safetensors" in refused("--lora", str(tmp_path / "lora.safetensors"))


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """The UNet of SD 1.5 at full size, three times: 3.4 GB each in float32."""
    for name, channels, seed in (("editor", 8, 1), ("base", 4, 2), ("student", 4, 3)):
        torch.manual_seed(seed)
        diffusers.UNet2DConditionModel(cross_attention_dim=768, in_channels=channels).save_pretrained(tmp_path / name)
    code = f"""{PEAK}
from pathlib import Path
from codi_jax.training.jobs import adaptation
from codi_jax.io.weights import open_model
before = peak()
editor = adaptation.Editor(*open_model({str(tmp_path / "editor")!r}))
delta = adaptation.delta_of_models(editor, {str(tmp_path / "base")!r}, {str(tmp_path / "student")!r})
adaptation.write_adapted(Path({str(tmp_path / "out")!r}), editor, delta, 0.5)
print(peak() - before)
"""
    grown = 1024 * int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "unet").glob("*.safetensors"))
    assert size > 3.4e9
    assert grown < 0.3 * size
