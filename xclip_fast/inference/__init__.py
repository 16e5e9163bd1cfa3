"""Faster inference of a trained model: CUDA graphs, FP8, batches of video files."""
