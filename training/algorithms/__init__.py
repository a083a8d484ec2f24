"""The training algorithms, one file each, registered by their name in a recipe's ``[algorithm]`` table."""
