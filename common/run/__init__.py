"""Everything around training: command line, output folder, checkpoints, devices, torchrun."""
