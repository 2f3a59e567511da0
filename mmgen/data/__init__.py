"""WebDataset shards to packed global steps, in an order and with randomness that depend on content alone."""
