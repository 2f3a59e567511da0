"""Documents, packed rows and the attention rule."""
