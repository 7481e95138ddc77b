"""What the console script can do."""
