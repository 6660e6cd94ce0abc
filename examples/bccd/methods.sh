#!/usr/bin/env bash
# Every method on one detector: teacher -> store -> baseline and one student a method -> comparison.
#
#   examples/bccd/methods.sh DETECTOR DATA WEIGHTS OUT
#
# DETECTOR: gfl, retinanet, retinanet_distribution (its box branch predicts distributions, as LD needs), faster_rcnn
# (torchvision's) or mm_faster_rcnn (mmdet's).
# DATA, WEIGHTS, OUT: as for run.sh. One seed of everything comes first, then the next. Run the same command again to go on
# after an interruption: finished runs are kept, begun ones resumed. From the environment: SEEDS="0 1 2", METHODS="ld bckd",
# EPOCHS=12, CANVAS=256x320 (192x256 for both Faster R-CNNs), and JOBS=2 for two students at once (on two cores that is 1.6 times as many an hour).
set -euo pipefail
detector=$1 data=$2 weights=$3 out=$4/$1
case $detector in
  gfl) methods="ld rm pfi defeat defeat_thin bckd drkd drkd_lite cwd pkd fgd ld,pfi ld,rm,pfi" ;;
  retinanet) methods="rm pfi defeat defeat_thin bckd drkd drkd_lite cwd pkd fgd" ;;
  retinanet_distribution) methods="ld" ;;
  faster_rcnn | mm_faster_rcnn) methods="defeat drkd" ;;
  *) echo "DETECTOR is gfl, retinanet, retinanet_distribution, faster_rcnn or mm_faster_rcnn" >&2 && exit 2 ;;
esac
methods=${METHODS:-$methods} jobs=${JOBS:-1} canvas=256x320
if [[ $detector = *faster_rcnn ]]; then canvas=192x256; fi # at 256x320 an epoch of its teacher takes a core 115 s
common=(--data "$data" --canvas "${CANVAS:-$canvas}" --batch 8 --amp bf16 --eval-every 4
  --set optim.lr=0.02 --set optim.clip=35 --set model.bn=train)
student=(--epochs "${EPOCHS:-12}" --model "${detector%_distribution}_shufflenet_v2_x0_5" --set model.fpn_channels=64
  --set model.tower_convs=2 --backbone-weights "$weights/shufflenet_v2_x0_5_backbone.pth")
teacher=(--epochs 24 --model "${detector%_distribution}_mobilenet_v2" --set model.fpn_channels=128
  --backbone-weights "$weights/mobilenet_v2_imagenet.pth")
case $detector in
  *faster_rcnn) student+=(--set model.head_channels=128) && teacher+=(--set model.head_channels=256) ;;
  *_distribution) common+=(--set model.box=distribution) ;;
esac
students=$out/students
if [ "${EPOCHS:-12}" != 12 ]; then students=$out/students-$EPOCHS; fi

if [ -f "$out/teacher/config.toml" ]; then
  kdcli train --resume "$out/teacher"
else
  kdcli train "${common[@]}" "${teacher[@]}" --out "$out/teacher"
fi
all=$(tr ' ' '\n' <<<"${methods//,/ }" | sort -u | paste -sd,)
kdcli cache-teacher --data "$data" --teacher "$out/teacher" --method "${STORE_METHODS:-$all}" --views identity,hflip --out "$out/store"

if [ "$jobs" -gt 1 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
# a method that stops (a guard) is reported, and the queue goes on
one() {
  local method=$1 seed=$2
  if [ "$method" = baseline ]; then
    kdcli train "${common[@]}" "${student[@]}" --seeds "$seed" --out "$students/baseline"
  else
    kdcli distill "${common[@]}" "${student[@]}" --seeds "$seed" --cache "$out/store" --method "$method" \
      --out "$students/${method//,/-}"
  fi || echo "$method, seed $seed: stopped" >&2
}
for seed in ${SEEDS:-0 1 2}; do
  for method in baseline $methods; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    one "$method" "$seed" &
  done
done
wait
kdcli compare "$students" "$out/teacher" --html "$out/report.html" --plots "$out/plots"
