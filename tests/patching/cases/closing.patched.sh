#!/bin/sh
MODEL="
  --num-layers 8
  --hidden-size 64
  --num-attention-heads 4
  --num-experts 8
  --moe-tie-group-size 2
  --moe-tie-pipeline allreduce"
EXTRA="\
  --moe-router-topk 2 \
  --bf16"
python -m megatron_tied.megatron_lm pretrain_gpt.py $MODEL $EXTRA
