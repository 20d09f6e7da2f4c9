#!/usr/bin/env bash
# Fewer blocks, fewer steps, and both, from the avatars in assets/: a student of each of the levels base, small and tiny, LCM on
# the whole model and on each student, short runs that tell what the features are good for (level small, three seeds with
# and without them), and the comparison of all. Every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_small.sh [FOLDER] [STAGE ...]    (PYTHON=.venv/bin/python; all stages without STAGE)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/small}
model=${MODEL:-assets/avatars}
samples=${SAMPLES:-50000}
evaluated=${EVALUATED:-300}
short_steps=${SHORT_STEPS:-500}
stages=("${@:2}")
[ ${#stages[@]} -gt 0 ] || stages=(data students features steps evaluate)

run=(--train_data_dir "$work/data/train" --validation_data_dir "$work/data/validation" --resolution 64
     --cache_latents --cache_dir "$work/cache" --train_batch_size 32 --lr_scheduler cosine --lr_warmup_steps 100
     --logging_steps 100 --checkpointing_steps 500 --checkpoints_total_limit 1 --resume_from_checkpoint latest
     --num_validation_images 16 --validation_steps 0 --guidance_scale 3 --save_dtype float16)

draw() { "$python" dataset_tools/avatars.py "$@"; }
# Without --feature_normalize the term of the features starts at fifty times the others.
student() {
  "$python" training_scripts/train_bk_sdm_flax.py "${run[@]}" --pretrained_model_name_or_path "$model" \
    --distill_table assets/recipes/small-levels.yaml --proportion_empty_prompts 0.1 --use_ema --ema_decay 0.99 "$@"
}
# w is the guidance scale minus 1.
lcm() {
  "$python" training_scripts/train_lcm_flax.py "${run[@]}" --pretrained_teacher_model "$1" --w_min 1 --w_max 5 \
    --learning_rate 3e-4 --max_train_steps "${LCM_STEPS:-1000}" --output_dir "$2"
}
all() { echo "$work/$1-0,$work/$1-1,$work/$1-2"; }

stage_data() {
  draw --train_data_dir "$work/data/train" --max_train_samples "$samples"
  draw --train_data_dir "$work/data/validation" --max_train_samples 1000 --split validation
}

stage_students() {
  for level in base small tiny; do
    student --distill_level "$level" --feature_normalize --learning_rate 1e-3 --max_train_steps "${BK_STEPS:-1500}" \
      --output_dir "$work/$level"
  done
}

stage_features() {
  short=(--distill_level small --learning_rate 4e-4 --max_train_steps "$short_steps")
  for seed in 0 1 2; do
    student "${short[@]}" --feature_normalize --seed "$seed" --output_dir "$work/features-$seed"
    student "${short[@]}" --output_weight 0 --feature_weight 0 --seed "$seed" --output_dir "$work/task-$seed"
  done
}

stage_steps() {
  lcm "$model" "$work/full-lcm"
  for level in base small tiny; do lcm "$work/$level" "$work/$level-lcm"; done
}

stage_evaluate() {
  "$python" -m codi_jax.evaluate --models "full@50,4,1=$model" "full, LCM@4,1=$work/full-lcm" \
    "base@50,4,1=$work/base" "base, LCM@4,1=$work/base-lcm" "small@50,4,1=$work/small" "small, LCM@4,1=$work/small-lcm" \
    "tiny@50,4,1=$work/tiny" "tiny, LCM@4,1=$work/tiny-lcm" "small, $short_steps steps@50=$(all features)" \
    "small, $short_steps steps, task loss alone@50=$(all task)" \
    --data "$work/data/validation" --guidance_scale 3 --max_samples "$evaluated" --output_dir "$work/evaluation"
}

for stage in "${stages[@]}"; do "stage_$stage"; done
