"""Break what a device reads, and see what it says: `python tools/break_it --help`."""
