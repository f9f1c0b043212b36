"""Stage 1: text from anywhere → balanced, filtered, deduplicated, shuffled Parquet shards."""
