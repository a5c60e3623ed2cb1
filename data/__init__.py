"""PDFs and other sources to shards, shards to packed batches."""
