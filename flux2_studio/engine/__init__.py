"""The FLUX.2 inference engine: tensors in, tensors out.

It knows nothing of web pages, model hubs, environment variables or saving. Importing this package imports none of its
modules.
"""
