"""The commands `mmgen data check`, `show`, `buckets` and `index`."""
