"""A checkpoint is judged on patients nobody has touched."""
