"""Records a trainer without changing what it does, and stores each step as a trace."""
