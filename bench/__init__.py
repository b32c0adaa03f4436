"""What agentos costs, measured beside what a reader knows: `python -m bench`, or `make bench`."""
