"""Time to accuracy: the contenders and their runs."""
