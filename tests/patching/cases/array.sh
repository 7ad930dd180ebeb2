#!/bin/bash
# A small model on one node, with arrays.
GPUS=8
NODES=${SLURM_NNODES:-1}

LAUNCH=(
    --nproc_per_node $GPUS
    --nnodes $NODES
)

MODEL=(
    --num-layers 12        # three stages of four
    --hidden-size 64
    --num-attention-heads 8
    --ffn-hidden-size 192
    --disable-bias-linear
    --swiglu
    --normalization RMSNorm
    --seq-length 128
    --vocab-size 1000
)

MOE=(
    # as many as fit
    --num-experts 16       # two a rank
    --moe-ffn-hidden-size 96
    --moe-router-topk 2
    --expert-model-parallel-size 4
)

TRAINING=(--bf16 --micro-batch-size 1 --global-batch-size 16 --use-distributed-optimizer)
if [ -n "${TRACKING}" ]; then
    TRAINING+=(
        --wandb-project "one of ours"
    )
fi

torchrun ${LAUNCH[@]} pretrain_gpt.py \
    "${MODEL[@]}" \
    "${MOE[@]}" \
    "${TRAINING[@]}"
