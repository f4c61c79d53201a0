"""What is left of a score when a clip is spoilt, a stream is missing or the two disagree; and for whom."""
