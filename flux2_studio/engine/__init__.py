"""The FLUX.2 inference engine: tensors in, tensors out.

Knows nothing of pages, hubs, environment variables or saving. Importing this package imports nothing else;
each module is imported by whoever needs it.
"""
