"""How good a trained model is: its loss on held-out data, and the tasks of lm-evaluation-harness."""
