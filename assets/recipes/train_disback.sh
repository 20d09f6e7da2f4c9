#!/usr/bin/env bash
# One step: text to image from the avatars in assets/, by DisBack and by plain distribution matching (DMD), three seeds each
# with as many updates of the generator, and their attributes and FID-lite in the course of training beside the teacher's.
# The generator starts far from the teacher: at a time (TIME, of 1000) where the teacher's single step shows little but color.
# Every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_disback.sh [FOLDER] [STAGE ...]    (PYTHON=.venv/bin/python; all stages without STAGE)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/disback}
model=${MODEL:-assets/avatars}
steps=${STEPS:-720}
samples=${SAMPLES:-50000}
evaluated=${EVALUATED:-300}
every=$((steps / 12))
stages=("${@:2}")
[ ${#stages[@]} -gt 0 ] || stages=(data generators evaluate)

# Prompts alone: the pictures of the data are not read.
run=(--pretrained_model_name_or_path "$model" --train_data_dir "$work/data/train" --resolution 64
     --validation_data_dir "$work/data/validation" --num_validation_images 16 --validation_steps 0 --save_dtype float16
     --train_batch_size 32 --real_guidance_scale 3 --teacher_guidance_scale 3 --conditioning_timestep "${TIME:-799}"
     --dfake_gen_update_ratio 1 --use_ema --ema_decay 0.98 --generator_lr 2e-4 --guidance_lr 4e-4
     --lr_scheduler constant_with_warmup --lr_warmup_steps 20 --max_train_steps "$steps" --export_steps "$every"
     --logging_steps 25 --checkpointing_steps "$every" --checkpoints_total_limit 1 --resume_from_checkpoint latest)
# Four nodes, 10 steps apart: after 50 the score is that of the untrained generator. Each is the target for 4 updates of
# the generator, and the teacher from the 12th on.
path=(--num_nodes 4 --degradation_interval 10 --interval 4)

draw() { "$python" dataset_tools/avatars.py "$@"; }

stage_data() {
  draw --train_data_dir "$work/data/train" --max_train_samples "$samples"
  draw --train_data_dir "$work/data/validation" --max_train_samples 1000 --split validation
}

stage_generators() {
  for seed in 0 1 2; do
    "$python" training_scripts/train_disback_flax.py "${run[@]}" "${path[@]}" --seed "$seed" \
      --output_dir "$work/disback-$seed"
    "$python" training_scripts/train_disback_flax.py "${run[@]}" --stage backtracking --path none --seed "$seed" \
      --output_dir "$work/dmd-$seed"
  done
}

stage_evaluate() {
  "$python" -m codi_jax.evaluate --models "teacher=$model" "DisBack=$work/disback-0,$work/disback-1,$work/disback-2" \
    "DMD=$work/dmd-0,$work/dmd-1,$work/dmd-2" --data "$work/data/validation" --steps 1 50 \
    --training_steps $(seq "$every" "$every" "$steps") --guidance_scale 1 --guidance_scales teacher:3 --max_samples "$evaluated" \
    --output_dir "$work/evaluation"
}

for stage in "${stages[@]}"; do "stage_$stage"; done
