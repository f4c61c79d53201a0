"""The models, their objectives, the training loop, checkpoints and export."""

if __name__ != "affekt.pretrain":
    raise ImportError("this folder is the package affekt.pretrain; install the project and import it under that name")
