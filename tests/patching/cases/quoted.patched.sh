#!/bin/bash
SIZE=${1:-small}
NNODES=2
GPUS_PER_NODE=4
OPTIONS_OF_LAUNCH="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --master_port 6000"

if [ $SIZE = small ]; then
    LAYERS=16
    NUM_EXPERTS=8
    moe_options=" \
        --num-experts ${NUM_EXPERTS} \
        --moe-tie-group-size 3 \
        --moe-tie-lr-divisor linear \
        --moe-router-topk 2 \
        --moe-grouped-gemm \
        "
elif [ $SIZE = dense ]; then
    LAYERS=16
    moe_options=""
fi

case $SIZE in
    small) HIDDEN=64 ;;
    --num-experts) echo "--num-experts is no size"; exit 1 ;;
esac

gpt_options=" \
    --num-layers ${LAYERS} \
    --hidden-size ${HIDDEN} \
    --num-attention-heads 4 \
    --split '99,1,0' \
    --bf16 \
    --seq-length 64"

run_cmd="torchrun $OPTIONS_OF_LAUNCH -m megatron_tied.megatron_lm pretrain_small.py
 ${gpt_options} ${moe_options}"
echo ${run_cmd}
eval ${run_cmd}
