"""What the scripts share. Nothing here imports a script or holds a training loop."""
