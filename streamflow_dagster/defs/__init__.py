"""One module for each concept of the graph."""
