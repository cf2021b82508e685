"""A demonstration dataset: invented support requests in English and Russian."""
