"""Pages made from what MLflow recorded."""
