#!/usr/bin/env bash
# Fewer blocks, fewer steps, and both, from the model in assets/: a student of each of the levels base, small and tiny,
# LCM on the whole model and on each student, short runs that tell what the features are good for (level small, three
# seeds with and without them), and the comparison of all.
# About two hours on 2 cores; every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_small.sh [FOLDER]    (PYTHON=.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/small}
model=${MODEL:-assets/emoji}
[ -e "$work/data" ] || "$python" dataset_tools/emoji.py --copies 2 --output_dir "$work/data"

run=(--train_data_dir "$work/data/train" --validation_data_dir "$work/data/validation" --resolution 64
     --cache_latents --cache_dir "$work/cache" --train_batch_size 32 --lr_scheduler cosine --lr_warmup_steps 100
     --logging_steps 100 --checkpointing_steps 500 --checkpoints_total_limit 2 --resume_from_checkpoint latest
     --num_validation_images 16 --validation_steps 0 --guidance_scale 3 --save_dtype float16)

# Without --feature_normalize the term of the features starts at fifty times the others.
student() {
  "$python" training_scripts/train_bk_sdm_flax.py "${run[@]}" --pretrained_model_name_or_path "$model" \
    --distill_table assets/recipes/small-levels.yaml --proportion_empty_prompts 0.1 --use_ema --ema_decay 0.99 "$@"
}
for level in base small tiny; do
  student --distill_level "$level" --feature_normalize --learning_rate 1e-3 --max_train_steps "${BK_STEPS:-1500}" \
    --output_dir "$work/$level"
done
short=(--distill_level small --learning_rate 4e-4 --max_train_steps 500)
for seed in 0 1 2; do
  student "${short[@]}" --feature_normalize --seed "$seed" --output_dir "$work/features-$seed"
  student "${short[@]}" --output_weight 0 --feature_weight 0 --seed "$seed" --output_dir "$work/task-$seed"
done

# Steps and blocks together. w is the guidance scale minus 1.
lcm() {
  "$python" training_scripts/train_lcm_flax.py "${run[@]}" --pretrained_teacher_model "$1" --w_min 2 --w_max 8 \
    --learning_rate 3e-4 --max_train_steps "${LCM_STEPS:-800}" --output_dir "$2"
}
lcm "$model" "$work/full-lcm"
for level in base small tiny; do lcm "$work/$level" "$work/$level-lcm"; done

all() { echo "$work/$1-0,$work/$1-1,$work/$1-2"; }
"$python" -m codi_jax.evaluate --models "full@50=$model" "full@4,1=$work/full-lcm" \
  "base@50=$work/base" "base@4,1=$work/base-lcm" "small@50=$work/small" "small@4,1=$work/small-lcm" \
  "tiny@50=$work/tiny" "tiny@4,1=$work/tiny-lcm" "small, 500 steps@50=$(all features)" \
  "small, 500 steps, task loss alone@50=$(all task)" \
  --data "$work/data/validation" --guidance_scale 3 --seeds 0 1 2 --max_samples 200 --output_dir "$work/evaluation"
