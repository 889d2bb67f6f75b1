"""What `make bench` measures; JSON on standard output."""
