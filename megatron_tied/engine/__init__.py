"""DeepSpeed: process groups, the tied engine, parameter groups, and what a ds_config may say."""
