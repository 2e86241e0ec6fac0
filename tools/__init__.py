"""What looks at data, runs and results without being needed to train."""
