"""Finding clips: sound for a picture, a picture for sound, and clips that express the same."""
