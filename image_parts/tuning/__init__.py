"""The parts of iterative_tuning.py: a search space, a staged evaluator, a search, and what is written about them."""
