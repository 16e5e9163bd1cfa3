"""X-CLIP video recognition, exact and fast."""
