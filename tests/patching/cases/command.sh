set -e
export CUDA_DEVICE_MAX_CONNECTIONS=1

# `tools/` has another script that takes --num-experts 4: it is not this one.
python3 -u -m torch.distributed.launch --nproc_per_node=4 \
  pretrain_gpt.py \
  --num-layers=8 --hidden-size=64 \
  --num-attention-heads=4 \
  --moe-router-topk=2 --num-experts=8 \
  --tensor-model-parallel-size=2 \
  --expert-model-parallel-size=2 \
  --data-path "a b.bin" \
  "$@"
