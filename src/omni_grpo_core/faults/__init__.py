"""The fault catalogue: mistakes of real pipelines, each a context manager around a clean loop."""
