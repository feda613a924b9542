"""A slide without counts: what a model predicts on it."""
