"""The ops of X-CLIP and their backends."""
