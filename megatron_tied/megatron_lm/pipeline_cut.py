"""How Megatron-Core will cut a pipeline, from Megatron-LM's arguments alone: no process group exists yet."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build


def layers_of_chunks(args: Namespace, stages: int) -> tuple[int, ...]:
    """The number of decoder layers in each model chunk, in pipeline order; `args` are validated.

    Sources: `PipelineParallelLayerLayout` and `get_num_layers_to_build`, which the model is built by.
    """
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    if layout is not None:
        if not isinstance(layout, PipelineParallelLayerLayout):
            layout = PipelineParallelLayerLayout(layout, stages)
        chunks = layout.virtual_pipeline_model_parallel_size
        return tuple(
            layout.layout[stage][chunk].count(LayerType.decoder) for chunk in range(chunks) for stage in range(stages)
        )
    chunks = args.virtual_pipeline_model_parallel_size
    config = SimpleNamespace(
        num_layers=args.num_layers,
        pipeline_model_parallel_layout=None,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_layers_in_last_pipeline_stage=getattr(args, "decoder_last_pipeline_num_layers", None),
        account_for_embedding_in_pipeline_split=getattr(args, "account_for_embedding_in_pipeline_split", False),
        account_for_loss_in_pipeline_split=getattr(args, "account_for_loss_in_pipeline_split", False),
    )
    return tuple(
        get_num_layers_to_build(config, chunk if chunks else None, stage)
        for chunk in range(chunks or 1)
        for stage in range(stages)
    )
