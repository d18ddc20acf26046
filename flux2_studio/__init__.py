"""flux2-studio: make and edit images with the FLUX.2 open models on your own hardware."""

__version__ = "0.1.0"
