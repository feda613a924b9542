"""How far a score, or a single prediction, can be believed."""
