"""The `megatron-tied` command: one module per subcommand."""
