"""Access to WebDataset shards: archives, stores, samples and indexes."""
