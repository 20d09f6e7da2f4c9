#!/usr/bin/env bash
# Compares CoDi with what it starts from, the avatars in assets/ and their ControlNet: three PE-CoDi students of four steps,
# the ControlNet trained on as many samples more, one student of full CoDi, students for super-resolution and inpainting, and
# the evaluation of those that there are. Every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_codi.sh [FOLDER] [STAGE ...]    (PYTHON=.venv/bin/python; all stages without STAGE)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/codi}
model=${MODEL:-assets/avatars}
controlnet=${CONTROLNET:-assets/avatars-controlnet}
steps=${STEPS:-2000}
every=$((steps / 5))
stages=("${@:2}")
[ ${#stages[@]} -gt 0 ] || stages=(data students full tasks evaluate)

run=(--pretrained_model_name_or_path "$model" --train_data_dir "$work/data/train"
     --validation_data_dir "$work/data/validation" --resolution 64 --cache_latents --cache_dir "$work/cache"
     --train_batch_size 32 --learning_rate 3e-4 --lr_scheduler cosine --lr_warmup_steps 50 --max_train_steps "$steps"
     --export_steps "$every" --logging_steps 100 --checkpointing_steps "$every" --checkpoints_total_limit 1
     --resume_from_checkpoint latest --num_validation_images 16 --validation_steps 0 --save_dtype float16)
from_controlnet=(--controlnet_model_name_or_path "$controlnet")

# λ = 0 (no pull to the data) and a grid of the four times that the student is sampled at; the teacher's steps are taken
# with the ControlNet that training starts from.
codi=("${from_controlnet[@]}" --distill_learning_steps 4 --distill_x0_weight 0 --onestepode_control_params initial
      --ema_decay 0.95)
train_codi() { "$python" training_scripts/train_codi_flax.py "${run[@]}" "$@"; }
train_controlnet() {
  "$python" training_scripts/train_controlnet_flax.py "${run[@]}" --use_ema --ema_decay 0.998 --guidance_scale 1 "$@"
}
draw() { "$python" dataset_tools/avatars.py "$@"; }
evaluate() { "$python" -m codi_jax.evaluate --guidance_scale 1 "$@"; }

stage_data() {
  draw --train_data_dir "$work/data/train" --max_train_samples 50000
  draw --train_data_dir "$work/data/validation" --max_train_samples 1000 --split validation
}

stage_students() {
  train_codi "${codi[@]}" --seed 0 --output_dir "$work/student-0"
  train_controlnet "${from_controlnet[@]}" --output_dir "$work/controlnet"
  train_codi "${codi[@]}" --seed 1 --output_dir "$work/student-1"
  train_codi "${codi[@]}" --seed 2 --output_dir "$work/student-2"
}

stage_full() { train_codi "${codi[@]}" --train unet --output_dir "$work/full"; }

# New conditions, learned and distilled in one go, as the method was made for: from the text-to-image model alone.
stage_tasks() {
  for task in super_resolution inpainting; do
    draw --train_data_dir "$work/data/$task" --max_train_samples 400 --split validation --condition "$task"
    train_codi --task "$task" --distill_learning_steps 4 --ema_decay 0.95 --output_dir "$work/$task"
    train_controlnet --task "$task" --output_dir "$work/$task-controlnet"
  done
}

stage_evaluate() {
  few="PE-CoDi@4,2,1=$work/student-0,$work/student-1,$work/student-2"
  models=("ControlNet@50,4,2,1=$work/controlnet" "$few")
  [ ! -d "$work/full" ] || models+=("full CoDi@4,2,1=$work/full")
  evaluate --models "${models[@]}" --data "$work/data/validation" --max_samples 300 --output_dir "$work/evaluation"
  evaluate --models "ControlNet@1,4=$work/controlnet" "${few/4,2,1/1,4}" --data "$work/data/validation" --max_samples 300 \
    --metrics fid_lite attributes --training_steps $(seq "$every" "$every" "$steps") --output_dir "$work/curve"
  for task in super_resolution inpainting; do
    [ ! -d "$work/$task" ] || evaluate --models "ControlNet@50,4=$work/$task-controlnet" "CoDi@4,1=$work/$task" \
      --data "$work/data/$task" --metrics attributes fid_lite psnr --output_dir "$work/evaluation-$task"
  done
}

for stage in "${stages[@]}"; do "stage_$stage"; done
