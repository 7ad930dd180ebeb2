#!/bin/sh
MODEL="
  --num-layers 8
  --hidden-size 64
  --num-attention-heads 4
  --num-experts 8"
EXTRA="\
  --moe-router-topk 2 \
  --bf16"
python pretrain_gpt.py $MODEL $EXTRA
