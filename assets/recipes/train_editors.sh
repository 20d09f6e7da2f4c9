#!/usr/bin/env bash
# Editing, from the editor in assets: LCM students of that teacher (three, and one that takes both guidances),
# the training-free adaptation with the difference of a whole LCM and of a LoRA, and the comparison of all. Every run goes on
# where it was when the script is started again.
#
#   bash assets/recipes/train_editors.sh [FOLDER] [STAGE ...]    (PYTHON=.venv/bin/python; all stages without STAGE)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/editors}
teacher=${TEACHER:-assets/avatars-edit}
model=${MODEL:-assets/avatars}
steps=${STEPS:-1500}
samples=${SAMPLES:-50000}
evaluated=${EVALUATED:-300}
stages=("${@:2}")
[ ${#stages[@]} -gt 0 ] || stages=(data students guidances adapted evaluate scales)

run=(--resolution 64 --cache_latents --cache_dir "$work/cache" --train_batch_size 32 --lr_scheduler cosine
     --lr_warmup_steps 100 --learning_rate 3e-4 --max_train_steps "$steps" --logging_steps 100 --checkpointing_steps 300
     --checkpoints_total_limit 1 --resume_from_checkpoint latest --num_validation_images 16 --validation_steps 0
     --save_dtype float16)
edits=(--pretrained_teacher_model "$teacher" --train_data_dir "$work/data/edits/train"
       --validation_data_dir "$work/data/edits/validation" --guidance_scale 3 --image_guidance_scale 2.5)
text=(--pretrained_teacher_model "$model" --train_data_dir "$work/data/text/train"
      --validation_data_dir "$work/data/text/validation" --guidance_scale 3)
# w is the guidance scale minus 1.
guided=(--w_min 1 --w_max 5)
at_image_scale=("${guided[@]}" --w_image_min 1.5 --w_image_max 1.5)
both_guided=("${guided[@]}" --w_image_min 0 --w_image_max 2)
weights=(0.25 0.5 0.75 1)

draw() { "$python" dataset_tools/avatars.py "$@"; }
train_editor() { "$python" training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py "${run[@]}" "${edits[@]}" "$@"; }
train_text() { "$python" training_scripts/train_lcm_flax.py "${run[@]}" "${text[@]}" "${guided[@]}" "$@"; }
adapt() { "$python" training_scripts/adapt_instruct_pix2pix.py --pretrained_model_name_or_path "$teacher" "$@"; }
evaluate() {
  "$python" -m codi_jax.evaluate --data "$work/data/edits/validation" --guidance_scale 3 --image_guidance_scale 2.5 "$@"
}

stage_data() {
  draw --train_data_dir "$work/data/edits/train" --max_train_samples "$samples" --task edit
  draw --train_data_dir "$work/data/edits/validation" --max_train_samples 1000 --task edit --split validation
  draw --train_data_dir "$work/data/text/train" --max_train_samples "$samples"
  draw --train_data_dir "$work/data/text/validation" --max_train_samples 1000 --split validation
}

stage_students() {
  for seed in 0 1 2; do train_editor "${at_image_scale[@]}" --seed "$seed" --output_dir "$work/student-$seed"; done
}

stage_guidances() { train_editor "${both_guided[@]}" --output_dir "$work/two-guidances"; }

# What LCM changed in the text-to-image model that the editor began as, added to the editor.
stage_adapted() {
  train_text --output_dir "$work/text-student"
  train_text --use_lora --lora_rank 32 --output_dir "$work/text-lora"
  adapt --base_model "$model" --distilled_model "$work/text-student" --weight "${weights[@]}" --output_dir "$work/adapted"
  adapt --lora "$work/text-lora" --weight "${weights[@]}" --output_dir "$work/adapted-lora"
}

stage_evaluate() {
  models=("teacher@50,4,2,1=$teacher" "LCM@4,2,1=$work/student-0,$work/student-1,$work/student-2"
          "two guidances@4,2,1=$work/two-guidances")
  scales=(--guidance_scales)
  images=(--image_guidance_scales)
  for kind in adapted adapted-lora; do
    for weight in "${weights[@]}"; do
      models+=("$kind $weight@5=$work/$kind/weight-$weight")
      scales+=("$kind $weight:2")
      images+=("$kind $weight:1")
    done
  done
  evaluate --models "${models[@]}" "${scales[@]}" "${images[@]}" --max_samples "$evaluated" --output_dir "$work/evaluation"
}

# Success and preservation as functions of both scales, of the teacher in 50 steps and the student in 4.
stage_scales() {
  models=() scales=(--guidance_scales) images=(--image_guidance_scales)
  for scale in 1.5 3 5; do
    for image in 1 2 3; do
      models+=("teacher $scale $image@50=$teacher" "student $scale $image@4=$work/two-guidances")
      scales+=("teacher $scale $image:$scale" "student $scale $image:$scale")
      images+=("teacher $scale $image:$image" "student $scale $image:$image")
    done
  done
  evaluate --models "${models[@]}" "${scales[@]}" "${images[@]}" --seeds 0 --max_samples $((evaluated / 3)) \
    --output_dir "$work/scales"
}

for stage in "${stages[@]}"; do "stage_$stage"; done
