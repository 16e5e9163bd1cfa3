"""Checkpoints of any layout: reading, writing, and the recipe that a checkpoint was trained with."""
