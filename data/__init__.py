"""Media to clips to shards to batches. Knows nothing of models."""

if __name__ != "affekt.data":
    raise ImportError("this folder is the package affekt.data; install the project and import it under that name")
