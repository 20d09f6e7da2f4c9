#!/usr/bin/env bash
# The comparison in BENCHMARKS.md, from the models in assets/: three PE-CoDi students of four steps and one of full CoDi, the
# ControlNet trained on as many samples more, and the evaluation of all.
# About an hour and a half on 2 cores; every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_codi.sh [FOLDER]    (PYTHON=.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/codi}
model=${MODEL:-assets/emoji}
controlnet=${CONTROLNET:-assets/emoji-controlnet}
[ -e "$work/data" ] || "$python" dataset_tools/emoji.py --copies 2 --output_dir "$work/data"

run=(--pretrained_model_name_or_path "$model" --controlnet_model_name_or_path "$controlnet"
     --train_data_dir "$work/data/train" --validation_data_dir "$work/data/validation" --resolution 64 --random_flip
     --cache_latents --cache_dir "$work/cache" --train_batch_size 32 --learning_rate 3e-4 --lr_scheduler cosine
     --lr_warmup_steps 50 --logging_steps 100 --checkpointing_steps 500 --checkpoints_total_limit 2
     --resume_from_checkpoint latest --num_validation_images 16 --validation_steps 0 --save_dtype float16)

# λ = 0 (no pull to the data) and a grid of the four times that the student is sampled at; the teacher's steps are taken
# with the ControlNet that training starts from.
codi=(--distill_learning_steps 4 --distill_x0_weight 0 --onestepode_control_params initial --ema_decay 0.95)
student() { "$python" training_scripts/train_codi_flax.py "${run[@]}" "${codi[@]}" "$@"; }

student --max_train_steps 1000 --seed 0 --output_dir "$work/student-0"
"$python" training_scripts/train_controlnet_flax.py "${run[@]}" --use_ema --ema_decay 0.998 --max_train_steps 1000 \
  --guidance_scale 1 --output_dir "$work/controlnet"
student --max_train_steps 1000 --seed 1 --output_dir "$work/student-1"
student --max_train_steps 1000 --seed 2 --output_dir "$work/student-2"
student --max_train_steps 800 --train unet --output_dir "$work/full"

"$python" -m codi_jax.evaluate --models "teacher=$model" "ControlNet=$work/controlnet" \
  "PE-CoDi=$work/student-0,$work/student-1,$work/student-2" "full_CoDi=$work/full" \
  --data "$work/data/validation" --steps 1 2 4 8 50 --guidance_scale 1 --guidance_scales teacher:3 --seeds 0 1 2 \
  --output_dir "$work/evaluation"
