"""Hugging Face models in and out, and tying or untying a trained model; weights are streamed, never whole in memory."""
