"""Datasets: CIFAR and small image folders in device memory, large image folders read by DataLoader workers."""
