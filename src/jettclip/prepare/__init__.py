"""Programs over data sets: what turns lists of pictures and captions into shards, and what looks shards over."""
