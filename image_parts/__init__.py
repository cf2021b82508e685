"""The parts of image_cluster.py, as typed functions that iterative_tuning.py calls too.

Imports go strictly downward: records < settings < decode < scan < preprocess < cache < features < pipeline < metrics <
exports < visualize, organize.
"""
