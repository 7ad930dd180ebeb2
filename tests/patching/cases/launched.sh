source common.sh
ARGS=(
  --num-layers 8
  --hidden-size 64
  --num-attention-heads 4
  --num-experts
  8
  --moe-router-topk 2
)
# Started elsewhere: what runs it is not known here.
${RUNNER} ${MEGATRON}/pretrain_gpt.py "${ARGS[@]}"
