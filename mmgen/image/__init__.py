"""Images of any size and kind, as patches of a model and back."""
