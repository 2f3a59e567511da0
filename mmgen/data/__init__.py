"""Reading WebDataset shards as packed global steps, in an order that depends on seed and content alone."""
