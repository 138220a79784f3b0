"""What was found, on a terminal: a file for each command."""
