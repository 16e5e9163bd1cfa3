"""A model at work: its device, processes and measured kernels, CUDA graphs, FP8, batches of video files."""
