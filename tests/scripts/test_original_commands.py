"""The commands of the methods' original documents, as they are typed there, against a hub of our own.

Only names of programs differ (``python3`` and our scripts), and what is appended: sizes and steps for models of a
few channels. What each trains is sampled by stock diffusers as the document says.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from folders import SIZE, make_pipeline
from oracle import make_torch
from picture_folders import numbered, write_folder
from PIL import Image
from published import TINY_UNETS
from served_hub import environment_of, folder_of_model, serve_addresses, serve_data_set, serve_hub_and_web
from web import jpeg

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 4
SMALL = (
    f" --resolution={SIZE} --max_train_steps=2 --gradient_accumulation_steps=1 --num_validation_images=1 "
    "--validation_sampling_steps 2 --dataloader_num_workers=0"
)

CODI = r"""
export HF_HOME="/data/huggingface/"
export DISK_DIR="/data/huggingface/cache"
export MODEL_DIR="runwayml/stable-diffusion-v1-5"
export OUTPUT_DIR="/data/canny_model"
{export}

python3 training_scripts/train_codi_flax.py \
 --pretrained_model_name_or_path=$MODEL_DIR \
 --output_dir=$OUTPUT_DIR \
 {data} \
 --load_from_disk \
 --cache_dir=$DISK_DIR \
 --resolution=512 \
 --learning_rate=1e-5 \
 --train_batch_size=2 \
 --revision="non-ema" \
 --from_pt \
 --max_train_steps=500000 \
 --checkpointing_steps=10000 \
 --dataloader_num_workers=16 \
 --distill_learning_steps 50 \
 --onestepode control \
 --onestepode_control_params target \
 --onestepode_sample_eps v_prediction \
 --distill_loss consistency_x"""  # in both places where the document has it
CODI_ON_THE_HUBS_DATA = (
    CODI.format(
        export='export DATASET_NAME="jax-diffusers-event/canny_diffusiondb"', data="--dataset_name=$DATASET_NAME"
    )
    + " --image_column original_image --caption_column prompt --conditioning_image transformed_image"
)
CODI_ON_ONES_OWN_DATA = CODI.format(export='export DATASET_DIR="/data/dataset"', data="--train_data_dir=$DATASET_DIR")

COYO = r"""
python3 dataset_tools/coyo_1m_dataset_preprocess.py \
 --train_data_dir="/data/dataset" \
 --cache_dir="/data" \
 --max_train_samples=1000000 \
 --num_proc=32"""

BK_SDM = r"""
export MODEL_NAME="SG161222/Realistic_Vision_V4.0"
export DATASET_NAME="lambdalabs/pokemon-blip-captions"

python3 training_scripts/train_bk_sdm_flax.py --mixed_precision="fp16" \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --dataset_name=$DATASET_NAME \
  --use_ema \
  --resolution=512 --center_crop --random_flip \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --gradient_checkpointing \
  --max_train_steps=15000 \
  --distill_level="sd_small"\
  --output_weight=0.5\
  --feature_weight=0.5\
  --learning_rate=1e-05 \
  --max_grad_norm=1 \
  --lr_scheduler="constant" --lr_warmup_steps=0 \
  --output_dir="sd-pokemon-model" """

LCM_EDITOR = r"""
python3 training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py \
  --pretrained_teacher_model="diffusers/sdxl-instructpix2pix" \
  --dataset_name="your/instruct-pix2pix-dataset" \
  --output_dir="./output/lcm-sdxl-instruct" \
  --resolution=768 \
  --train_batch_size=4 \
  --gradient_accumulation_steps=4 \
  --learning_rate=1e-4 \
  --max_train_steps=10000 \
  --validation_steps=500 \
  --checkpointing_steps=500 \
  --mixed_precision="fp16" \
  --seed=42"""

LCM_EDITOR_ADVANCED = r"""
python3 training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py \
  --pretrained_teacher_model="diffusers/sdxl-instructpix2pix" \
  --dataset_name="your/instruct-pix2pix-dataset" \
  --output_dir="./output/lcm-sdxl-instruct" \
  --resolution=768 \
  --train_batch_size=2 \
  --gradient_accumulation_steps=8 \
  --learning_rate=5e-5 \
  --max_train_steps=20000 \
  --num_ddim_timesteps=50 \
  --w_min=3.0 \
  --w_max=15.0 \
  --ema_decay=0.95 \
  --loss_type="huber" \
  --huber_c=0.001 \
  --mixed_precision="bf16" \
  --gradient_checkpointing \
  --enable_xformers_memory_efficient_attention \
  --use_8bit_adam \
  --validation_steps=250 \
  --val_image_url_or_path="path/to/val_image.jpg" \
  --validation_prompt="make it sunset" \
  --num_validation_images=4 \
  --checkpointing_steps=500 \
  --checkpoints_total_limit=3 \
  --push_to_hub \
  --hub_model_id="your-username/lcm-sdxl-instruct" \
  --report_to="wandb" """

# The document runs two shell scripts, with these commands.
DISBACK = r"""
export CHECKPOINT_PATH="/data/dmd2"
export WANDB_ENTITY="entity"
export WORKDIR="/data/disback"
export PATH_DIR="$WORKDIR/output/path"
export TARGET_NUM=24600

python3 training_scripts/train_disback_flax.py {stage} \
    --generator_lr 5e-7  \
    --guidance_lr 5e-7 \
    --output_path $WORKDIR/output \
    --cache_dir $WORKDIR/cache \
    --log_path $WORKDIR/log \
    --batch_size 1 \
    --grid_size 1 \
    --initialie_generator {iterations} \
    --resolution 1024 \
    --latent_resolution 128 \
    --seed 10 \
    --real_guidance_scale 8 \
    --fake_guidance_scale 1.0 \
    --max_grad_norm 10.0 \
    --model_id "stabilityai/stable-diffusion-xl-base-1.0" \
    --wandb_iters 100 \
    --wandb_entity $WANDB_ENTITY \
    --wandb_name "sdxl_cond399_8node_lr5e-7_1step_diffusion1000_gan5e-3_guidance8_noinit_noode"  \
    --log_loss \
    --dfake_gen_update_ratio 5 \
    --sdxl \
    --use_fp16 \
    --max_step_percent 0.98 \
    --cls_on_clean_image \
    --gen_cls_loss \
    --gen_cls_loss_weight 5e-3 \
    --guidance_cls_loss_weight 1e-2 \
    --diffusion_gan \
    --diffusion_gan_max_timestep 1000 \
    --conditioning_timestep 399 \
    --train_prompt_path $CHECKPOINT_PATH/captions_laion_score6.25.pkl \
    --real_image_path $CHECKPOINT_PATH/sdxl_vae_latents_laion_500k_lmdb/ \
    --ckpt_only_path $CHECKPOINT_PATH/{checkpoint} {path}"""
DMD2_CHECKPOINT = "sdxl_cond399_8node_lr5e-7_1step_diffusion1000_gan5e-3_guidance8_noinit_noode_checkpoint_model_024000"
DEGRADATION = DISBACK.format(
    stage="--stage degradation", iterations="--train_iters 25000 --log_iters 100", checkpoint=DMD2_CHECKPOINT, path=""
)
BACKTRACKING = DISBACK.format(
    stage="--stage backtracking", iterations="--train_iters 124000 --log_iters 5000", checkpoint=DMD2_CHECKPOINT,
    path="--trajectory_dir $PATH_DIR --start_target_num $TARGET_NUM --interval 1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A hub with the models and data sets that the documents name, and a web with the pictures of COYO."""
    yield from serve_hub_and_web(tmp_path_factory.mktemp("hub"), fill)


def fill(hub: SimpleNamespace, scratch: Path) -> None:
    sd = make_pipeline("text-to-image", scratch)
    sd.save_pretrained(folder_of_model(hub, "runwayml/stable-diffusion-v1-5/non-ema"), safe_serialization=False)
    sd.register_modules(unet=make_torch("unet", TINY_UNETS["four-blocks"], 3))
    sd.save_pretrained(folder_of_model(hub, "SG161222/Realistic_Vision_V4.0"))
    for name, family in {
        "diffusers/sdxl-instructpix2pix": "sdxl-instruct-pix2pix",
        "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    }.items():
        make_pipeline(family, scratch).save_pretrained(folder_of_model(hub, name))
    pictures = [numbered(10 * i, (SIZE, SIZE)) for i in range(PICTURES)]
    texts = [f"picture {i}" for i in range(PICTURES)]
    for name, columns in {
        "jax-diffusers-event/canny_diffusiondb": ("original_image", "prompt", "transformed_image"),
        "lambdalabs/pokemon-blip-captions": ("image", "text"),
        "your/instruct-pix2pix-dataset": ("input_image", "edit_prompt", "edited_image"),
    }.items():
        serve_data_set(hub, name, dict(zip(columns, (pictures, texts, pictures), strict=False)))
    serve_addresses(hub, "kakaobrain/coyo-700m", texts)


def typed(command: str, appended: str, folder: Path, hub: SimpleNamespace) -> None:
    """Runs a document's command in a folder, from which the scripts can be seen; its ``/data`` is in there, too."""
    for name in ("training_scripts", "dataset_tools"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    script = command.replace('"/data', f'"{folder}/data') + appended
    environment = environment_of(hub, folder / "home") | {"HF_TOKEN": "hf_write", "JAX_PLATFORMS": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def drawn(pipe: diffusers.DiffusionPipeline, prompt: str, **options: object) -> None:
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(prompt, height=SIZE, width=SIZE, generator=torch.Generator().manual_seed(0), **options).images[0]
    assert picture.size == (SIZE, SIZE)
    assert np.asarray(picture).std() > 1


def test_codi_on_the_hubs_data(hub: SimpleNamespace, tmp_path: Path) -> None:
    typed(CODI_ON_THE_HUBS_DATA, SMALL, tmp_path, hub)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "data/canny_model")
    drawn(pipe, "a cat", image=numbered(50, (SIZE, SIZE)), num_inference_steps=4, guidance_scale=0.0)


def test_codi_on_ones_own_data(hub: SimpleNamespace, tmp_path: Path) -> None:
    """The pictures come from COYO."""
    typed(COYO, f" --num_proc=1 --resolution={SIZE} --allow_private_addresses", tmp_path, hub)
    typed(CODI_ON_ONES_OWN_DATA, SMALL, tmp_path, hub)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "data/canny_model")
    drawn(pipe, "a cat", image=numbered(50, (SIZE, SIZE)), num_inference_steps=4, guidance_scale=0.0)


def test_bk_sdm(hub: SimpleNamespace, tmp_path: Path) -> None:
    typed(BK_SDM, SMALL, tmp_path, hub)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "sd-pokemon-model", safety_checker=None, requires_safety_checker=False
    )
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    drawn(pipe, "portrait", negative_prompt="cartoon", num_inference_steps=25, guidance_scale=7)
    assert len(pipe.unet.down_blocks[0].resnets) == 1


@pytest.mark.parametrize("command", [LCM_EDITOR, LCM_EDITOR_ADVANCED], ids=["basic", "advanced"])
def test_lcm_for_editors(command: str, hub: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/val_image.jpg").write_bytes(jpeg(0))
    typed(command, f"{SMALL} --train_batch_size=2 --report_to none", tmp_path, hub)
    folder = tmp_path / "output/lcm-sdxl-instruct"
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pretrained(folder)
    given = Image.fromarray(np.asarray(numbered(50, (SIZE, SIZE))))
    drawn(
        pipe, "make it a sunset scene", image=given, num_inference_steps=4, guidance_scale=7.5, image_guidance_scale=1.5
    )
    assert {path.name for path in folder.iterdir()} >= {
        "unet", "unet_target", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler",
    }  # fmt: skip
    if command == LCM_EDITOR_ADVANCED:
        uploaded = hub.root / "your-username/lcm-sdxl-instruct/main"
        assert (uploaded / "unet/config.json").read_bytes() == (folder / "unet/config.json").read_bytes()
        assert (uploaded / "README.md").is_file()


def test_disback(hub: SimpleNamespace, tmp_path: Path) -> None:
    """From DMD2's generator; its images are a folder of pictures, and not a database of latents."""
    base = folder_of_model(hub, "stabilityai/stable-diffusion-xl-base-1.0")
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    checkpoints = tmp_path / "data/dmd2"
    (checkpoints / DMD2_CHECKPOINT).mkdir(parents=True)
    torch.save(unet.state_dict(), checkpoints / DMD2_CHECKPOINT / "pytorch_model.bin")
    (checkpoints / "captions_laion_score6.25.pkl").write_bytes(pickle.dumps(["a", None, "b c"]))
    write_folder(checkpoints / "sdxl_vae_latents_laion_500k_lmdb", PICTURES, size=(SIZE, SIZE))
    small = (
        f" --resolution={SIZE} --max_train_steps=2 --num_nodes=2 --degradation_interval=1 --interval=1 "
        "--dfake_gen_update_ratio=1 --dataloader_num_workers=0 --num_validation_images=1"
    )
    typed(DEGRADATION, small, tmp_path, hub)
    typed(BACKTRACKING, small, tmp_path, hub)
    output = tmp_path / "data/disback/output"
    assert len([path for path in (output / "path").iterdir() if path.is_dir()]) == 2
    trained = diffusers.UNet2DConditionModel.from_pretrained(output / "unet")
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, unet=trained, use_safetensors=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    drawn(pipe, "A photo of a dog.", num_inference_steps=1, guidance_scale=0, timesteps=[399])
