"""Metrics of generated images, the features that they need, and the report that shows them."""
