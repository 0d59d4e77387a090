"""Code shared by the scripts. Nothing here imports a script or contains a training loop."""
