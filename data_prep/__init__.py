"""Scripts that turn raw sources into WebDataset shards and tokenizers; each runs as `python -m data_prep.NAME`."""
