"""What the `mmgen data` commands do."""
