"""The parts of image_cluster.py, as typed functions that iterative_tuning.py calls too.

Imports go strictly downward: records < settings < decode < file_index < scan < preprocess < cache < extractors <
features < pipeline < purity < tables < question; on records and decode stand sprites < scatter_html < grids <
visualize, and exports; on records and settings stand naming < yolo < moves < plan < plan_check < journal < placer <
restorer < organize.
"""
