"""What labcore.train is made of: devices, memory, optimizers, checkpoints, several processes."""
