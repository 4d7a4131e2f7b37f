"""Experiments beside the lab's stages: schemes, bits per layer, recipes, corrupted images."""
