ARGS="--num-layers 8 --hidden-size 64 --num-attention-heads 4"
ARGS="$ARGS --num-experts 8 --moe-router-topk 1"   # one expert a token
ARGS+=" --fp16"
ENGINE="python -m torch.distributed.run --nproc-per-node $((2 * 2))"
$ENGINE pretrain_gpt.py $ARGS 2>&1 | cat
