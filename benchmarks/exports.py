"""Runs two steps of every training script on the models in assets/, and computes a digest of each written file.

A refactoring should leave these files unchanged, bit for bit. Run this before and after the change, on one machine, and
compare:

    git worktree add /tmp/before main
    python3 benchmarks/exports.py --tree /tmp/before --work /tmp/exports/before
    python3 benchmarks/exports.py --work /tmp/exports/after --compare /tmp/exports/before/digests.json

The data is 12 pictures with captions, made here from a seed. Takes about 20 minutes on 2 cores the first time, and half
of that if programs are cached.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent.parent
_SIDE = 64
_COMMON = (
    "--resolution 64 --train_batch_size 2 --max_train_steps 2 --lr_warmup_steps 0 --report_to none --seed 7 "
    "--num_validation_images 2 --validation_steps 0 --checkpointing_steps 0"
)
# By name: the script, its flags, and whether it takes the common ones. {data}, {runs} and {assets} are filled in.
RUNS: dict[str, tuple[str, str, bool]] = {
    "autoencoder": (
        "train_autoencoder_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --use_ema --learning_rate 1e-3",
        True,
    ),
    "text_to_image": (
        "train_text_to_image_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --train_text_encoder --use_ema "
        "--snr_gamma 5 --noise_offset 0.1 --input_perturbation 0.1 --validation_sampling_steps 2",
        True,
    ),
    "controlnet": (
        "train_controlnet_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --task canny "
        "--validation_sampling_steps 2",
        True,
    ),
    "instruct_pix2pix": (
        "train_instruct_pix2pix_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --original_image_column "
        "conditioning_image --edit_prompt_column text --edited_image_column image --conditioning_dropout_prob 0.1 "
        "--validation_sampling_steps 2",
        True,
    ),
    "codi": (
        "train_codi_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --distill_learning_steps 8 "
        "--cfg_aware_distill --onestepode_cfg --snr_gamma 5 --validation_sampling_steps 1 2",
        True,
    ),
    "codi_unet": (
        "train_codi_flax",
        "--pretrained_model_name_or_path {assets}/avatars --controlnet_model_name_or_path {assets}/avatars-controlnet "
        "--train_data_dir {data} --distill_learning_steps 4 --train unet --onestepode_control_params initial "
        "--cache_latents --cache_latents_dir {runs}/latents --validation_sampling_steps 1",
        True,
    ),
    "lcm": (
        "train_lcm_flax",
        "--pretrained_teacher_model {assets}/avatars --train_data_dir {data} --num_ddim_timesteps 10 --loss_type huber "
        "--validation_sampling_steps 1 2",
        True,
    ),
    "lcm_lora": (
        "train_lcm_flax",
        "--pretrained_teacher_model {assets}/avatars --train_data_dir {data} --use_lora --lora_rank 4 "
        "--validation_sampling_steps 2",
        True,
    ),
    "tcd": (
        "train_tcd_flax",
        "--pretrained_teacher_model {assets}/avatars --train_data_dir {data} --num_ddim_timesteps 10 "
        "--validation_sampling_steps 1 2",
        True,
    ),
    "lcm_controlnet": (
        "train_lcm_flax",
        "--pretrained_teacher_model {assets}/avatars --controlnet_model_name_or_path {assets}/avatars-controlnet "
        "--train_data_dir {data} --task canny --bake_guidance_scale 3 --mixed_precision bf16 "
        "--validation_sampling_steps 1",
        True,
    ),
    "lcm_instruct_pix2pix": (
        "train_lcm_distil_instruct_pix2pix_sdxl",
        "--pretrained_teacher_model {assets}/avatars-edit --train_data_dir {data} --original_image_column "
        "conditioning_image --edit_prompt_column text --edited_image_column image --w_image_min 0 --w_image_max 1 "
        "--conditioning_dropout_prob 0.05 --validation_sampling_steps 1",
        True,
    ),
    "tcd_instruct_pix2pix": (
        "train_tcd_instruct_pix2pix_flax",
        "--pretrained_teacher_model {assets}/avatars-edit --train_data_dir {data} --original_image_column "
        "conditioning_image --edit_prompt_column text --edited_image_column image --validation_sampling_steps 1",
        True,
    ),
    "bk_sdm": (
        "train_bk_sdm_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --distill_level tiny "
        "--distill_table {assets}/recipes/small-levels.yaml --prediction_type v_prediction --use_ema "
        "--validation_sampling_steps 2",
        True,
    ),
    "disback": (
        "train_disback_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --num_nodes 2 "
        "--degradation_interval 1 --interval 1 --use_ema --generator_lr 1e-4 --guidance_lr 2e-4 "
        "--real_guidance_scale 3",
        True,
    ),
    "dmd_gan": (
        "train_disback_flax",
        "--pretrained_model_name_or_path {assets}/avatars --train_data_dir {data} --stage backtracking --path none "
        "--denoising --num_denoising_step 2 --backward_simulation --cls_on_clean_image --gen_cls_loss --diffusion_gan "
        "--generator_lora --lora_rank 4",
        True,
    ),
    "adapted": (
        "adapt_instruct_pix2pix",
        "--pretrained_model_name_or_path {assets}/avatars-edit --base_model {assets}/avatars "
        "--distilled_model {runs}/bare --weight 0.5 --validation_prompt 3 "
        "--validation_image {data}/processed_images/3.png --validation_sampling_steps 2",
        False,
    ),
}
_BARE = "--pretrained_teacher_model {assets}/avatars --train_data_dir {data} --bake_guidance_scale 2"
# Contents that differ between runs: places, times and versions.
_PASSING = ("config.yaml", "metrics.jsonl", "path.json", ".lock", "events.out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=HERE, help="the checkout to run")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--compare", type=Path, help="digests.json of another tree")
    parser.add_argument("--only", nargs="*", help="names of runs")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = _make_data(work / "data")
    places = {"data": data, "runs": work, "assets": args.tree.resolve() / "assets"}
    if not args.only or "adapted" in args.only:
        _train(args.tree, "train_lcm_flax", f"{_COMMON} {_BARE} --validation_sampling_steps 1", work / "bare", places)
    for name, (script, flags, is_training) in RUNS.items():
        if not args.only or name in args.only:
            _train(args.tree, script, f"{_COMMON} {flags}" if is_training else flags, work / name, places)
    digests = {name: _digests(work / name) for name in RUNS if (work / name).is_dir()}
    (work / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
    if args.compare is not None:
        sys.exit(_compare(json.loads(args.compare.read_text()), digests))


def _make_data(folder: Path) -> Path:
    """Pictures of rectangles, mirrored ones as conditions, and captions that number them."""
    rng = np.random.default_rng(0)
    for name in ("images", "processed_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(12):
        picture = Image.new("RGB", (_SIDE, _SIDE), tuple(int(v) for v in rng.integers(0, 256, 3)))
        draw = ImageDraw.Draw(picture)
        for _ in range(3):
            x, y = (sorted(int(v) for v in rng.integers(0, _SIDE, 2)) for _ in range(2))
            draw.rectangle((x[0], y[0], x[1], y[1]), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        picture.save(folder / "images" / f"{i}.png")
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "processed_images" / f"{i}.png")
        row = {"image": f"images/{i}.png", "conditioning_image": f"processed_images/{i}.png", "text": f"picture {i}"}
        lines.append(json.dumps(row))
    (folder / "meta.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _train(tree: Path, script: str, flags: str, output_dir: Path, places: dict[str, Path]) -> None:
    if output_dir.is_dir():
        return  # from an interrupted run of this program
    unfinished = output_dir.with_name(output_dir.name + ".unfinished")
    subprocess.run(["rm", "-rf", str(unfinished)], check=True)
    command = [sys.executable, f"training_scripts/{script}.py", *flags.format(**places).split()]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    done = subprocess.run(  # noqa: PLW1510
        [*command, "--output_dir", str(unfinished)], cwd=tree, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    print(f"{output_dir.name}: {seconds:.0f} s" + (", FAILED" if done.returncode else ""), flush=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    unfinished.rename(output_dir)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kept = [path for path in files if not path.name.startswith(_PASSING)]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def _compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> int:
    differences = 0
    for name in before.keys() | after.keys():
        old, new = before.get(name, {}), after.get(name, {})
        for file in sorted(old.keys() | new.keys()):
            if old.get(file) != new.get(file):
                what = "missing" if file not in new else "new" if file not in old else "differs"
                print(f"{name}/{file}: {what}")
                differences += 1
    print(f"{differences} differences in {sum(map(len, after.values()))} files")
    return int(differences > 0)


if __name__ == "__main__":
    main()
