"""The leak gate of an evaluation: passed before anything is judged."""
