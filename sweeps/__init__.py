"""Many fold-trained models across a cluster, with the score kept in MLflow."""
