"""Clio: from dialogues to facets, clusters, names and a taxonomy made in two ways."""
