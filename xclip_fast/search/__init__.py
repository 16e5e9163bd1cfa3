"""Stored video features, and search in them by text."""
