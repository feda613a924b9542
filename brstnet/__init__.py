"""Learn spatial gene expression from H&E-stained breast histology, judged honestly."""

__version__ = "0.4.0"
