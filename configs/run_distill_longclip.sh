#!/usr/bin/env bash
# Trains a small CLIP model that reads long captions, with Long-CLIP's loss and distillation from stored features.
#
#   bash configs/run_distill_longclip.sh                # the built-in demo: no data needed, ten minutes on two cores
#   TRAIN_DATA='shards/{00000..00099}.tar' VAL_DATA='held-out/{00..03}.tar' FEATURES=vitl NPROC_PER_NODE=8 \
#       bash configs/run_distill_longclip.sh --lr 1e-4  # the real thing; any flag at the end overrides what stands here
#
# The features come from scripts/extract_features.py, which asks a teacher about every sample once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh" jettclip

if [[ -z "${TRAIN_DATA:-}" ]]; then
    exec bash "$root/scripts/run_demo.sh" "$@"
fi

# what to train
MODEL="${MODEL:-MobileCLIP2-S0-248}"             # a config of src/jettclip/models/configs, or any of OpenCLIP's
PRETRAINED="${PRETRAINED:-}"                     # weights to start from: a file, a folder, or a tag of OpenCLIP's
VAL_DATA="${VAL_DATA:-}"                         # held-out shards; none: no evaluation
FEATURES="${FEATURES:-}"                         # feature stores beside the shards, separated by commas; none: no distillation
LOSS="${LOSS:-$([[ -n "$FEATURES" ]] && echo jettclip || echo longclip)}"  # a preset or a formula

# how to train it
BATCH_SIZE="${BATCH_SIZE:-256}"                  # on each GPU
EPOCHS="${EPOCHS:-6}"
LR="${LR:-1e-4}"
WARMUP="${WARMUP:-200}"                          # steps
WORKERS="${WORKERS:-6}"                          # loader processes for each GPU
# longclip, jettclip, debias and himo-clip start from S = exp(logit scale) = 100, meant for pretrained weights; without
# them, from CLIP's own start
if [[ -z "$PRETRAINED" && "$LOSS" =~ ^(longclip|jettclip|debias|himo-clip)$ ]]; then
    LOGIT_SCALE_INIT="${LOGIT_SCALE_INIT:-14.3}"
fi
LOGIT_SCALE_INIT="${LOGIT_SCALE_INIT:-}"         # none: the loss's own
LOGS="${LOGS:-logs}"
NAME="${NAME:-}"                                 # of the run folder under $LOGS; none: made of date and settings

# where to train it; on several nodes, run this script on each of them
NPROC_PER_NODE="${NPROC_PER_NODE:-1}"            # GPUs of a node
NNODES="${NNODES:-1}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"          # host name of one of the nodes, the same on all
MASTER_PORT="${MASTER_PORT:-29500}"
RUN_ID="${RUN_ID:-jettclip}"                     # tells runs on the same node and port apart

if [[ "$NNODES" == 1 ]]; then
    rendezvous=(--standalone)
else
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RUN_ID")
fi

# the -- keeps torchrun from taking --logs for a flag of its own
exec torchrun --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" "${rendezvous[@]}" -m -- jettclip.main \
    --train-data "$TRAIN_DATA" \
    ${VAL_DATA:+--val-data "$VAL_DATA"} \
    --model "$MODEL" \
    ${PRETRAINED:+--pretrained "$PRETRAINED"} \
    --loss "$LOSS" \
    ${FEATURES:+--features "$FEATURES"} \
    ${LOGIT_SCALE_INIT:+--logit-scale-init "$LOGIT_SCALE_INIT"} \
    --batch-size "$BATCH_SIZE" \
    --epochs "$EPOCHS" \
    --lr "$LR" \
    --warmup "$WARMUP" \
    --wd 0.01 \
    --precision amp_bf16 \
    --workers "$WORKERS" \
    --logs "$LOGS" \
    ${NAME:+--name "$NAME" --resume latest} \
    "$@"
