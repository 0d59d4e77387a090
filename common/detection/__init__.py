"""What detection.py is made of: torchvision's Faster R-CNN, the method on it (App. D, E), sets in COCO's format."""
