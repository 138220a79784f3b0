"""Results on the terminal, one module per command."""
