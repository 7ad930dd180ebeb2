SCRIPT="pretrain_gpt.py"
ALL=()
ALL+=(
    "--num-layers 8"
    "--hidden-size 64"
    '--num-attention-heads' '4'
    "--num-experts 8 --moe-tie-group-size 2 --moe-tie-skip-first 0"
    "--moe-layer-freq ([0]*2+[1]*6)"
)
if [ ! -f "$SCRIPT" ]; then
    echo "Where is pretrain_gpt.py?"
fi
torchrun --standalone --nproc-per-node 2 -m megatron_tied.megatron_lm ${SCRIPT} ${ALL[@]}
