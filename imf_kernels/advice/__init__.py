"""`explain`: the path of each call inside `jvp`, and what to change in a network."""
