"""Tokenizer, documents, packed rows and the attention rule."""
