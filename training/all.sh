#!/bin/bash
# Every stage of the demo models' training that FOLDER lacks, packed into RESULTS as soon as it is done:
#   bash training/all.sh FOLDER RESULTS
# VAE, T2V and I2V are the minutes of each stage; START exported models (parallel_backend/checkpoints) to go on from, whose
# VAE and text encoder stay as they are unless VAE or TEXT=1 is given; OPTIONS more for both transformers.
set -e
folder=$1 results=$2
cd "$(dirname "$0")/.."
mkdir -p "$folder" "$results"

pack() {
    python3 -m training.export --folder "$folder" --output "$folder/out"
    tar czf "$results/partial" -C "$folder/out" "$2" && mv "$results/partial" "$results/$1.tar.gz"
}

if [ ! -d "$folder/vae" ] && [ -n "$START" ] && [ -z "$VAE" ]; then cp -r "$START/demo/vae" "$folder/vae"; fi
if [ ! -d "$folder/vae" ]; then
    python3 -m training.vae --folder "$folder" --minutes "${VAE:-9}" ${START:+--start "$START/demo/vae"}
    tar czf "$results/vae.tar.gz" -C "$folder" vae
fi
if [ ! -d "$folder/text_encoder" ] && [ -n "$START" ] && [ -z "$TEXT" ]; then
    cp -r "$START/demo/text_encoder" "$folder/text_encoder"
fi
if [ ! -d "$folder/text_encoder" ]; then python3 -m training.text --folder "$folder"; fi
for variant in t2v i2v; do
    minutes=${T2V:-10} name=demo
    [ $variant = i2v ] && minutes=${I2V:-5} name=demo-i2v
    if [ ! -d "$folder/$variant" ]; then
        python3 -m training.transformer --variant $variant --folder "$folder" --minutes "$minutes" \
            ${START:+--start "$START/$name"} $OPTIONS
        pack $variant $name
    fi
done
