"""Frozen features, probes, metrics with intervals, reports."""

if __name__ != "affekt.finetune":
    raise ImportError("this folder is the package affekt.finetune; install the project and import it under that name")
