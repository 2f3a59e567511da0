"""Golden records: results of small runs, which a change must reproduce unless it is meant to change numbers."""
