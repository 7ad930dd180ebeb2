"""What can be known before a long run on many machines: each check compares what all hosts find on themselves."""
