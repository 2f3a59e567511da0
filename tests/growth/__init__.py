"""One thing is added in each file, as CONTRIBUTING.md describes; nothing else of mmgen is touched."""
