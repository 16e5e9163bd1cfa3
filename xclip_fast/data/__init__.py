"""Video in: sampling, decoding, generated clips."""
