"""The embedded corpus: procedural talking faces with sound, six emotions planted in both streams."""
