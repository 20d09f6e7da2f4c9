#!/usr/bin/env bash
# Fewer blocks, fewer steps, and both, from the model in assets/: students of the levels base, small and tiny (three of the
# level small, and as many by the task's loss alone), LCM on the whole model and on a student of each level, and the
# comparison of all.
# About an hour and a quarter on 2 cores; every run goes on where it was when the script is started again.
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
prune=(--pretrained_model_name_or_path "$model" --distill_table assets/recipes/emoji-levels.yaml
       --proportion_empty_prompts 0.1 --learning_rate 4e-4 --use_ema --ema_decay 0.99
       --max_train_steps "${BK_STEPS:-500}")
student() { "$python" training_scripts/train_bk_sdm_flax.py "${run[@]}" "${prune[@]}" "$@"; }
for level in base small tiny; do
  student --distill_level "$level" --feature_normalize --output_dir "$work/$level-0"
done
for seed in 1 2; do student --distill_level small --feature_normalize --seed "$seed" --output_dir "$work/small-$seed"; done
for seed in 0 1 2; do
  student --distill_level small --output_weight 0 --feature_weight 0 --seed "$seed" --output_dir "$work/task-$seed"
done

# Steps and blocks together. w is the guidance scale minus 1.
lcm() {
  "$python" training_scripts/train_lcm_flax.py "${run[@]}" --pretrained_teacher_model "$1" --w_min 2 --w_max 8 \
    --learning_rate 3e-4 --max_train_steps "${LCM_STEPS:-800}" --output_dir "$2"
}
lcm "$model" "$work/full-lcm"
for level in base small tiny; do lcm "$work/$level-0" "$work/$level-lcm"; done

all() { echo "$work/$1-0,$work/$1-1,$work/$1-2"; }
"$python" -m codi_jax.evaluate --models "full@50=$model" "full@4,1=$work/full-lcm" \
  "base@50=$work/base-0" "base@4,1=$work/base-lcm" "small@50=$(all small)" "small@4,1=$work/small-lcm" \
  "tiny@50=$work/tiny-0" "tiny@4,1=$work/tiny-lcm" "small,_without_features@50=$(all task)" \
  --data "$work/data/validation" --guidance_scale 3 --seeds 0 1 2 --max_samples 200 --output_dir "$work/evaluation"
