#!/usr/bin/env bash
# The whole path on a real data set in COCO layout: teacher -> store -> baseline and distilled students -> comparison.
#
#   examples/bccd/run.sh DATA WEIGHTS OUT
#
# DATA     folder with annotations/{train,val}.json and {train,val}/ (blood cells: github.com/Shenggan/BCCD_Dataset, MIT)
# WEIGHTS  folder with mobilenet_v2_imagenet.pth and shufflenet_v2_x0_5_backbone.pth (torchvision key names)
# OUT      where runs, store and report go; run the same command again to go on after an interruption
set -euo pipefail
data=$1 weights=$2 out=$3
methods=(ld rm pfi ld,pfi ld,rm,pfi)
seeds=${SEEDS:-0,1,2}
common=(--data "$data" --canvas 256x320 --batch 8 --amp bf16 --set optim.lr=0.02 --set optim.clip=35)
student=(--model gfl_shufflenet_v2_x0_5 --backbone-weights "$weights/shufflenet_v2_x0_5_backbone.pth"
  --set model.fpn_channels=64 --set model.tower_convs=2 --set model.bn=train)

# a run that was begun is resumed, a finished one is left alone
run() {
  local command=$1 folder=$2
  shift 2
  if [ -f "$folder/config.toml" ]; then kdcli "$command" --resume "$folder"; else kdcli "$command" "$@" --out "$folder"; fi
}

run train "$out/teacher" "${common[@]}" --epochs 24 --eval-every 4 --model gfl_mobilenet_v2 \
  --backbone-weights "$weights/mobilenet_v2_imagenet.pth" --set model.fpn_channels=128 --set model.bn=train

kdcli cache-teacher --data "$data" --teacher "$out/teacher" --method ld,rm,pfi --views identity,hflip --out "$out/store"
kdcli cache verify "$out/store"

for epochs in ${EPOCHS:-12 24}; do
  [ "$epochs" = 12 ] && these=$seeds || these=${LONG_SEEDS:-0}
  folder="$out/students-$epochs"
  kdcli train "${common[@]}" "${student[@]}" --epochs "$epochs" --eval-every 4 --seeds "$these" --out "$folder/baseline"
  for method in "${methods[@]}"; do
    kdcli distill "${common[@]}" "${student[@]}" --epochs "$epochs" --eval-every 4 --seeds "$these" \
      --cache "$out/store" --method "$method" --out "$folder/${method//,/-}"
  done
  kdcli compare "$folder" "$out/teacher" --html "$out/report-$epochs.html" --plots "$out/plots-$epochs" \
    --json >"$out/compare-$epochs.json"
  kdcli compare "$folder" "$out/teacher"
done
