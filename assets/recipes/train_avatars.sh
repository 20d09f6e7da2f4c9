#!/usr/bin/env bash
# Makes the avatar models in assets/ from nothing: data, the reader of attributes, autoencoder, vocabulary, text to image,
# ControlNet, editor. Every run goes on where it was when the script is started again.
#
#   bash assets/recipes/train_avatars.sh [FOLDER] [STAGE ...]    (PYTHON=.venv/bin/python; all stages without STAGE)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/avatars}
recipe=assets/recipes/avatars
stages=("${@:2}")
[ ${#stages[@]} -gt 0 ] || stages=(data reader vae start text controlnet editor)

data=(--train_data_dir "$work/data/train" --validation_data_dir "$work/data/validation" --resolution 64)
run=(--logging_steps 100 --checkpointing_steps 500 --checkpoints_total_limit 2 --resume_from_checkpoint latest
     --num_validation_images 16 --validation_steps 2000 --use_ema --save_dtype float16 --lr_scheduler cosine)
cached=(--cache_latents --cache_dir "$work/cache" --train_batch_size 32)

draw() { "$python" dataset_tools/avatars.py "$@"; }

stage_data() {
  draw --train_data_dir "$work/data/train" --max_train_samples 50000
  draw --train_data_dir "$work/data/validation" --max_train_samples 1000 --split validation
  draw --train_data_dir "$work/edits/train" --max_train_samples 50000 --task edit
  draw --train_data_dir "$work/edits/validation" --max_train_samples 1000 --task edit --split validation
}

# Reads attributes off pictures: the judge of all that follows.
stage_reader() {
  [ -e "$work/reader/confusion.txt" ] || "$python" assets/recipes/train_reader.py --output_dir "$work/reader"
}

# 16 latent channels: with 8, eyes and mouths are lost. Gradients make small details sharp. 42 minutes on 2 cores; of the
# reconstructions' attributes 0.994 are right (the rest are double rings, which look thin), at 34.0 dB.
stage_vae() {
  "$python" training_scripts/train_autoencoder_flax.py --model_config_name_or_path "$recipe/vae" "${data[@]}" "${run[@]}" \
    --train_batch_size 16 --max_train_steps 5000 --learning_rate 1.5e-3 --lr_warmup_steps 200 --adam_beta2 0.99 \
    --adam_weight_decay 1e-4 --ema_decay 0.998 --gradient_scale 1 --output_dir "$work/vae"
  "$python" assets/recipes/check_autoencoder.py --vae "$work/vae/vae" --reader "$work/reader" --picture "$work/vae.png"
}

# The folder to start from: configurations, the vocabulary and the VAE. The vocabulary was learned by
#   python3 assets/recipes/avatar_words.py words.txt
#   python3 dataset_tools/train_tokenizer.py --train_data_dir words.txt --vocab_size 1024 --model_max_length 40 \
#     --output_dir assets/recipes/avatars/tokenizer
stage_start() {
  [ ! -e "$work/start" ] || return 0
  rm -rf "$work/start.unfinished"
  cp -r "$recipe" "$work/start.unfinished"
  vae=$work/vae/vae
  [ -e "$vae" ] || vae=assets/avatars/vae
  cp "$vae"/* "$work/start.unfinished/vae/"
  mv "$work/start.unfinished" "$work/start"
}

stage_text() {
  "$python" training_scripts/train_text_to_image_flax.py --pretrained_model_name_or_path "$work/start" \
    --from_scratch unet text_encoder "${data[@]}" "${run[@]}" "${cached[@]}" --train_text_encoder \
    --proportion_empty_prompts 0.1 --guidance_scale 3 --snr_gamma 5 --max_train_steps 10000 --learning_rate 6e-4 \
    --lr_warmup_steps 300 --ema_decay 0.9995 --output_dir "$work/text"
}

# The text-to-image model of this folder or, where that stage did not run, the one in assets.
text() { if [ -e "$work/text/unet" ]; then echo "$work/text"; else echo assets/avatars; fi; }

# By plain denoising: what CoDi starts from.
stage_controlnet() {
  "$python" training_scripts/train_controlnet_flax.py --pretrained_model_name_or_path "$(text)" "${data[@]}" "${run[@]}" \
    "${cached[@]}" --proportion_empty_prompts 0.3 --max_train_steps 3000 --learning_rate 5e-4 --lr_warmup_steps 50 \
    --ema_decay 0.998 --guidance_scale 1 --output_dir "$work/controlnet"
}

# InstructPix2Pix, from the text-to-image model.
stage_editor() {
  "$python" training_scripts/train_instruct_pix2pix_flax.py --pretrained_model_name_or_path "$(text)" \
    --train_data_dir "$work/edits/train" --validation_data_dir "$work/edits/validation" --resolution 64 "${run[@]}" \
    "${cached[@]}" --conditioning_dropout_prob 0.05 --max_train_steps 8000 --learning_rate 4e-4 --lr_warmup_steps 100 \
    --ema_decay 0.999 --guidance_scale 3 --image_guidance_scale 2.5 --output_dir "$work/editor"
}

for stage in "${stages[@]}"; do "stage_$stage"; done
