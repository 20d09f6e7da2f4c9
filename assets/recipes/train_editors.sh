#!/usr/bin/env bash
# Editing, from the models in assets/: LCM students of the InstructPix2Pix teacher (three, and one that takes both
# guidances), the training-free adaptation, and the comparison of all.
# About an hour and a half on 2 cores; every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_editors.sh [FOLDER]    (PYTHON=.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/editors}
teacher=${MODEL:-assets/emoji-edit}
[ -e "$work/data" ] || "$python" dataset_tools/emoji.py --copies 2 --output_dir "$work/data"

run=(--resolution 64 --cache_latents --cache_dir "$work/cache" --train_batch_size 32 --lr_scheduler cosine
     --lr_warmup_steps 100 --logging_steps 50 --checkpointing_steps 400 --checkpoints_total_limit 2
     --resume_from_checkpoint latest --num_validation_images 16 --validation_steps 0 --save_dtype float16)
edits=(--train_data_dir "$work/data/edits/train" --validation_data_dir "$work/data/edits/validation")
text=(--train_data_dir "$work/data/train" --validation_data_dir "$work/data/validation")
scales=(--guidance_scale 6 --image_guidance_scale 1.5)

# w is the guidance scale minus 1. After so few steps a student follows w only in part: it is trained, and sampled, with
# more guidance than the teacher is sampled with.
lcm=("${run[@]}" --w_min 2 --w_max 8 --learning_rate 3e-4 --max_train_steps "${STEPS:-800}")
for seed in 0 1 2; do
  "$python" training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py --pretrained_teacher_model "$teacher" \
    "${edits[@]}" "${lcm[@]}" "${scales[@]}" --seed "$seed" --output_dir "$work/student-$seed"
done
"$python" training_scripts/train_lcm_distil_instruct_pix2pix_sdxl.py --pretrained_teacher_model "$teacher" \
  "${edits[@]}" "${lcm[@]}" "${scales[@]}" --w_image_min 0 --w_image_max 1 --output_dir "$work/two-guidances"

# The training-free adaptation: what LCM changed in the text-to-image model.
"$python" training_scripts/train_lcm_flax.py --pretrained_teacher_model assets/emoji "${text[@]}" "${lcm[@]}" \
  --guidance_scale 6 --output_dir "$work/text-student"
"$python" training_scripts/adapt_instruct_pix2pix.py --pretrained_model_name_or_path "$teacher" \
  --base_model assets/emoji --distilled_model "$work/text-student" --weight 0.5 --output_dir "$work/adapted"

students="$work/student-0,$work/student-1,$work/student-2"
"$python" -m codi_jax.evaluate --models "teacher=$teacher" "LCM=$students" \
  "LCM, two guidances@1,2,4,8=$work/two-guidances" "adapted@2,5,8=$work/adapted" \
  --data "$work/data/edits/validation" --guidance_scale 6 --image_guidance_scale 1.5 \
  --guidance_scales teacher:3 adapted:2 --image_guidance_scales adapted:1 --seeds 0 1 2 \
  --max_samples 200 --output_dir "$work/evaluation"
