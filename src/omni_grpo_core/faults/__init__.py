"""The catalogue: what real pipelines get wrong, each a context manager around a clean one."""
