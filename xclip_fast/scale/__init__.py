"""Embedding, classifying and evaluating on many machines, with Ray Data."""
