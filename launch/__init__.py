"""Experiment files, how a run starts, and the arithmetic of the planner. No model code."""

if __name__ != "affekt.launch":
    raise ImportError("this folder is the package affekt.launch; install the project and import it under that name")
