"""What a run directory holds, by name."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"  # there when the last step is done
CHECKPOINTS = "checkpoints"
