"""A model at work: its device, processes and measured kernels, CUDA graphs, batches of video files."""
