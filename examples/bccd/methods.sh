#!/usr/bin/env bash
# Every method on one detector: teacher -> store -> baseline and one student a method -> comparison.
#
#   examples/bccd/methods.sh DETECTOR DATA WEIGHTS OUT      DETECTOR: gfl, retinanet or faster_rcnn
#
# DATA, WEIGHTS, OUT: as for run.sh. One seed of everything comes first, then the next (SEEDS="0 1 2"). Run the same command
# again to go on after an interruption: finished runs are kept. METHODS="ld bckd" chooses some.
set -euo pipefail
detector=$1 data=$2 weights=$3 out=$4/$1
case $detector in
  gfl) methods="ld rm pfi defeat defeat_thin bckd drkd drkd_lite cwd pkd fgd ld,pfi ld,rm,pfi" ;;
  retinanet) methods="rm pfi defeat defeat_thin bckd drkd drkd_lite cwd pkd fgd" ;;
  faster_rcnn) methods="defeat drkd" ;;
  *) echo "DETECTOR is gfl, retinanet or faster_rcnn" >&2 && exit 2 ;;
esac
methods=${METHODS:-$methods}
common=(--data "$data" --canvas 256x320 --batch 8 --amp bf16 --set optim.lr=0.02 --set optim.clip=35)
student=(--model "${detector}_shufflenet_v2_x0_5" --backbone-weights "$weights/shufflenet_v2_x0_5_backbone.pth"
  --set model.fpn_channels=64 --set model.tower_convs=2 --set model.bn=train)
teacher=(--model "${detector}_mobilenet_v2" --backbone-weights "$weights/mobilenet_v2_imagenet.pth"
  --set model.fpn_channels=128 --set model.bn=train)
[ "$detector" = faster_rcnn ] && student+=(--set model.head_channels=128) && teacher+=(--set model.head_channels=512)

if [ -f "$out/teacher/config.toml" ]; then
  kdcli train --resume "$out/teacher"
else
  kdcli train "${common[@]}" "${teacher[@]}" --epochs 24 --eval-every 4 --out "$out/teacher"
fi
all=$(tr ' ' '\n' <<<"${methods//,/ }" | sort -u | paste -sd,)
kdcli cache-teacher --data "$data" --teacher "$out/teacher" --method "${STORE_METHODS:-$all}" --views identity,hflip --out "$out/store"
seeds=
for seed in ${SEEDS:-0 1 2}; do
  seeds=${seeds:+$seeds,}$seed
  kdcli train "${common[@]}" "${student[@]}" --epochs 12 --eval-every 4 --seeds "$seeds" --out "$out/students/baseline"
  for method in $methods; do
    # a method that stops (a guard) is reported, and the queue goes on
    kdcli distill "${common[@]}" "${student[@]}" --epochs 12 --eval-every 4 --seeds "$seeds" --cache "$out/store" \
      --method "$method" --out "$out/students/${method//,/-}" || echo "$method stopped" >&2
  done
done
kdcli compare "$out/students" "$out/teacher" --html "$out/report.html" --plots "$out/plots"
