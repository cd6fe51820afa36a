"""What a training run needs around Algorithm 1."""
