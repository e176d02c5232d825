"""What a training will need, before it starts: memory, time, and how it scales over GPUs."""
