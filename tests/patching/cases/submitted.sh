#!/bin/bash
ROOT=${ROOT:-/opt/megatron}
TP=${TP:-1}
EP=${EP:-4}
ARGUMENTS=(
    --num-layers 24
    --hidden-size 128
    --num-attention-heads 8
    --multi-latent-attention
    --kv-lora-rank 32
    --num-experts 32
    --moe-layer-freq [0]*2+[1]*22
    --moe-shared-expert-intermediate-size 64
    --tensor-model-parallel-size ${TP}
    --expert-model-parallel-size ${EP}
    --use-distributed-optimizer
    --bf16
)
if [ "${TRACE}" = 1 ]; then
    TRACER="nsys profile \
        -o ${ROOT}/trace"
    ARGUMENTS=("${ARGUMENTS[@]}" --profile --profile-ranks 0)
fi
COMMAND="
cd ${ROOT};
${TRACER} python ${ROOT}/pretrain_gpt.py ${ARGUMENTS[@]}"
sbatch <<END
#!/bin/bash
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
# It's started on every task.
srun bash -c "${COMMAND}" 2>&1 | tee log.txt
END
