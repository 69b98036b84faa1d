"""What masks keep, and how far they overlap."""
