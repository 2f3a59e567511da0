"""Proposes the settings of a new run from a look at its data; `mmgen init` is its command."""
