"""Text to tokens to batches: tokenizer, indexed datasets, blends, resumable sampling."""
