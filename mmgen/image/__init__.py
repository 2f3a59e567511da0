"""Images of any origin as rows of patches, and back."""
