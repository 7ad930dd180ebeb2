"""What a run came to: read from its directory, shown in the terminal or as a page. No torch, no DeepSpeed."""
