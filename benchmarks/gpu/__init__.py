"""The stages of gpu_check.py: each file is a stage, each case a generator of rows that runs in a process of its own."""
