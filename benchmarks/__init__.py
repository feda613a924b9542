"""What we claim about speed and accuracy, runnable."""
