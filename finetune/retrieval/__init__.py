"""Search among embeddings: one stream by the other, clips by a clip."""
