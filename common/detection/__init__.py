"""Building blocks of detection.py: torchvision's Faster R-CNN, FCFD for it (App. D, E), datasets in COCO format."""
