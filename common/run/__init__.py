"""What scripts do besides training: command line, output folder, checkpoints, devices, torchrun."""
