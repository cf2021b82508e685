"""What train_metric_classifier.py is made of."""
