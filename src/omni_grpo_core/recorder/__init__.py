"""Watches somebody's trainer without changing what it does, and keeps each step as a trace."""
