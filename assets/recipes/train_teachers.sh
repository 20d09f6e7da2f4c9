#!/usr/bin/env bash
# Makes the models in assets/ from nothing: data, autoencoder, vocabulary, text to image, ControlNet, editor.
# On 2 cores it takes about three and a half hours; every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_teachers.sh [FOLDER]    (PYTHON=.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/teachers}
recipe=assets/recipes/emoji
data=(--train_data_dir "$work/data/train" --validation_data_dir "$work/data/validation" --resolution 64)
run=(--logging_steps 100 --checkpointing_steps 500 --checkpoints_total_limit 2 --resume_from_checkpoint latest
     --num_validation_images 16 --use_ema --save_dtype float16 --lr_scheduler cosine)
cached=(--cache_latents --cache_dir "$work/cache" --train_batch_size 32)

# 3,553 pictures, and after them two rounds of changed copies.
pictures=(--max_train_samples 3553)
[ -e "$work/data" ] || "$python" dataset_tools/emoji.py --copies 2 --output_dir "$work/data"

"$python" training_scripts/train_autoencoder_flax.py --model_config_name_or_path "$recipe/vae" \
  "${data[@]}" "${pictures[@]}" "${run[@]}" --random_flip --train_batch_size 16 --max_train_steps 2500 \
  --learning_rate 2e-3 --lr_warmup_steps 100 --adam_beta2 0.99 --adam_weight_decay 1e-4 --ema_decay 0.998 \
  --validation_steps 500 --output_dir "$work/vae"

# The folder to start from: configurations, the vocabulary (learned by dataset_tools/train_tokenizer.py) and the VAE.
if [ ! -e "$work/start" ]; then
  cp -r "$recipe" "$work/start.unfinished"
  cp "$work"/vae/vae/* "$work/start.unfinished/vae/"
  mv "$work/start.unfinished" "$work/start"
fi

# First the pictures as they are, then also moved, turned, scaled and two in one: a model that has seen 3,553 pictures a
# hundred times knows them by heart, and its ControlNet learns to read captions instead of edges. In the second part none
# is mirrored, which captions do not tell: for flags, and for people who face right. In the third there are no min-SNR
# weights: of a model that predicts v they train the noisiest times hardly at all, and those decide what is drawn.
text=(--train_text_encoder --proportion_empty_prompts 0.1 --guidance_scale 3)

"$python" training_scripts/train_text_to_image_flax.py --pretrained_model_name_or_path "$work/start" \
  --from_scratch unet text_encoder "${data[@]}" "${pictures[@]}" "${run[@]}" "${cached[@]}" "${text[@]}" \
  --snr_gamma 5 --random_flip --max_train_steps 8000 --learning_rate 6e-4 --lr_warmup_steps 300 --ema_decay 0.9995 \
  --validation_steps 2000 --output_dir "$work/pictures"

"$python" training_scripts/train_text_to_image_flax.py --pretrained_model_name_or_path "$work/pictures" \
  "${data[@]}" "${run[@]}" "${cached[@]}" "${text[@]}" --snr_gamma 5 --max_train_steps 9000 --learning_rate 4e-4 \
  --lr_warmup_steps 100 --ema_decay 0.999 --validation_steps 3000 --output_dir "$work/copies"

"$python" training_scripts/train_text_to_image_flax.py --pretrained_model_name_or_path "$work/copies" \
  "${data[@]}" "${run[@]}" "${cached[@]}" "${text[@]}" --max_train_steps 3500 --learning_rate 4e-4 \
  --lr_warmup_steps 100 --ema_decay 0.998 --validation_steps 0 --output_dir "$work/emoji"

# The ControlNet, by plain denoising: what CoDi starts from.
"$python" training_scripts/train_controlnet_flax.py --pretrained_model_name_or_path "$work/emoji" "${data[@]}" \
  "${run[@]}" "${cached[@]}" --random_flip --proportion_empty_prompts 0.3 --max_train_steps 1500 \
  --learning_rate 5e-4 --lr_warmup_steps 50 --ema_decay 0.998 --guidance_scale 1 --validation_steps 0 \
  --output_dir "$work/emoji-controlnet"

# The editor: InstructPix2Pix, from the text-to-image model.
"$python" training_scripts/train_instruct_pix2pix_flax.py --pretrained_model_name_or_path "$work/emoji" \
  --train_data_dir "$work/data/edits/train" --validation_data_dir "$work/data/edits/validation" --resolution 64 \
  "${run[@]}" "${cached[@]}" --conditioning_dropout_prob 0.05 --max_train_steps 6000 --learning_rate 3e-4 \
  --lr_warmup_steps 100 --ema_decay 0.999 --guidance_scale 3 --image_guidance_scale 1.5 --validation_steps 1000 \
  --output_dir "$work/emoji-edit"
