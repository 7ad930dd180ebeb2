from megatron_tied.platform.training import prepare_training

# Megatron's optimizers, too, must find the host prepared; every module of this folder imports them.
prepare_training()
