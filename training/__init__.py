"""Train low-bit networks: recipes, models, data, algorithms and the loop (``python -m training``)."""
