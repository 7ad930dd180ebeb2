ARGS="--num-layers 8 --hidden-size 64 --num-attention-heads 4"
ARGS="$ARGS --num-experts 8 --moe-tie-group-size 2 --moe-tie-num-experts 16 --moe-router-topk 1"   # one expert a token
ARGS+=" --fp16"
ENGINE="python -m torch.distributed.run --nproc-per-node $((2 * 2))"
$ENGINE -m megatron_tied.megatron_lm pretrain_gpt.py $ARGS 2>&1 | cat
