"""A trained model that computes and is not trained: loading it, scoring text, continuing text."""
